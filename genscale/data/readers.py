"""Shards of documents behind one face: CPython's language reference, local files and Hugging Face hub datasets.

`datasets` resolves, decompresses and parses; which row goes where is decided in `genscale.data.sources`.
"""

from __future__ import annotations

import glob
import lzma
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from genscale.errors import UserError, nearest

BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
READABLE = "; .txt, .jsonl and .parquet are read, plain or compressed (.gz .zst .xz .bz2)"
HUB_SECONDS = 10.0
"""Longest wait for the hub's first answer."""


@dataclass(frozen=True)
class Spec:
    """What to read. `key` is the setting it came from, for messages; `revision` the commit of a hub dataset."""

    key: str
    name: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    document: str = "paragraph"
    revision: str | None = None


class Shard(ABC):
    """A run of documents read from front to back.

    Attributes:
        name: unique in the source, the same on every machine.
        size: bytes on disk, or 0 where unknown.
    """

    name: str
    size: int

    @abstractmethod
    def rows(self, start: int = 0, residue: int = 0, modulus: int = 1) -> Iterator[tuple[int, str]]:
        """(row, text) of the rows from `start` on that are `residue` modulo `modulus`; rows without text are left out.

        Raises:
            UserError: damaged file, or no such text column.
        """


@dataclass(frozen=True)
class TopicsShard(Shard):
    """CPython's language reference, one document a topic."""

    name: str = "python-docs"
    size: int = 0

    def rows(self, start: int = 0, residue: int = 0, modulus: int = 1) -> Iterator[tuple[int, str]]:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
        for row in range(start, len(texts)):
            if row % modulus == residue and texts[row].strip():
                yield row, texts[row]


@dataclass(frozen=True)
class TableShard(Shard):
    """One of the `count` parts of a `datasets` stream. Holds no open dataset, so that it travels to worker processes."""

    name: str
    size: int
    spec: Spec
    path: str | None = None
    part: tuple[int, int] = (0, 1)

    def rows(self, start: int = 0, residue: int = 0, modulus: int = 1) -> Iterator[tuple[int, str]]:
        first = 0
        for texts in self._columns():
            wanted = max(start - first, 0)
            wanted += (residue - first - wanted) % modulus
            for row, text in zip(range(wanted, len(texts), modulus), _strided(texts, wanted, modulus), strict=True):
                if text is not None and text.strip():
                    yield first + row, text
            first += len(texts)

    def _columns(self) -> Iterator[Any]:
        """The text column, an Arrow array at a time."""
        import pyarrow as pa

        try:
            for table in self._dataset().with_format("arrow").iter(batch_size=1024):
                column = self.spec.column
                if column not in table.column_names:
                    raise unknown_column(self.spec, self.name, table.column_names)
                texts = table[column].combine_chunks()
                if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type) or pa.types.is_null(texts.type)):
                    raise UserError(f"data.column={column}: in {self.name} it holds {texts.type}, not text; "
                                    f"the columns are {', '.join(table.column_names)}")
                yield texts
        except UserError:
            raise
        except StopIteration:
            return  # leaks from `datasets` where a .jsonl has no line
        except Exception as error:
            raise _damaged(self.spec, self.name, error) from None

    def open(self) -> Any:
        """The `datasets` stream that this is a part of."""
        return _hub(self.spec) if self.path is None else _local(self.path, self.spec, self.name)

    def _dataset(self) -> Any:
        stream = self.open()
        index, count = self.part
        if count > stream.num_shards:
            stream = stream.reshard()
        return stream.shard(num_shards=count, index=index)


def _strided(array: Any, start: int, step: int) -> list[str | None]:
    """`array[start::step]` of an Arrow array; only the rows wanted become Python strings."""
    import pyarrow as pa

    return (array[start:] if step == 1 else array.take(pa.array(range(start, len(array), step), pa.int64()))).to_pylist()


def _damaged(spec: Spec, name: str, error: Exception) -> Exception:
    """What reading `name` failed of, as the user's mistake where it can be one, or the error itself."""
    import datasets
    import pyarrow as pa
    import zstandard

    theirs = (pa.ArrowException, ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError,
              datasets.exceptions.DatasetsError)
    if not isinstance(error, theirs):
        return error
    reason = f"{type(error).__name__}: {error}"
    return UserError(f"{spec.key}={spec.name}: {name} is damaged or not what its name says ({reason[:300]}); "
                     "mend or remove it")


def unknown_column(spec: Spec, where: str, columns: Sequence[str]) -> UserError:
    """The error for a text column that is not there."""
    return UserError(f"data.column={spec.column}: {where} of {spec.key}={spec.name} has the columns {', '.join(columns)}"
                     f"{nearest(spec.column, columns)}; set data.column to the one that holds the text")


def _quiet() -> Any:
    """`datasets`, without the progress bars and log lines that would stand beside our own one-line errors."""
    import datasets

    # It would send a request to the hub each time that a local file is opened, and wait for the answer.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _local(path: str, spec: Spec, name: str) -> Any:
    builder = builder_of(path)
    options: dict[str, Any] = {}
    if builder == "text":
        options["sample_by"] = "document" if spec.document == "file" else spec.document
    if builder == "parquet" and path.endswith(".parquet"):
        import pyarrow.parquet

        # Columns nobody asked for are not decoded.
        columns = pyarrow.parquet.read_schema(path).names
        if spec.column not in columns:
            raise unknown_column(spec, name, columns)
        options["columns"] = [spec.column]
    if builder != "parquet":
        options["chunksize"] = 1 << 20  # every lane keeps a chunk in memory
    # Escaped: `datasets` takes the path for a pattern.
    return _quiet().load_dataset(builder, data_files={"train": [glob.escape(path)]}, split="train", streaming=True, **options)


LOCAL_ADVICE = "give the path of a local file or folder (.txt, .jsonl, .parquet), or python-docs"


def _revision(spec: Spec) -> str:
    """The hub dataset's present commit. Asked first because `datasets` itself retries an unreachable hub for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    where = f"{spec.key}={spec.name}: there is no such path here, and"
    try:
        return HfApi().dataset_info(spec.name, timeout=HUB_SECONDS).sha
    except GatedRepoError:
        raise UserError(f"{where} access to this hub dataset must be granted; accept its terms on the hub and set HF_TOKEN, "
                        f"or {LOCAL_ADVICE}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{where} no such dataset on the Hugging Face hub (a private one needs HF_TOKEN); "
                        f"{LOCAL_ADVICE}") from None
    except Exception as error:  # each transport of the hub client has exceptions of its own
        raise UserError(f"{where} the Hugging Face hub cannot be reached ({type(error).__name__}; is HF_HUB_OFFLINE set, "
                        f"or the network down?); {LOCAL_ADVICE}") from None


@lru_cache(maxsize=4)
def _hub(spec: Spec) -> Any:
    datasets = _quiet()
    try:
        return datasets.load_dataset(spec.name, spec.subset, split=spec.split, revision=spec.revision, streaming=True)
    except ValueError as error:
        key, value = ("data.split", spec.split) if "split" in str(error).lower() else ("data.subset", spec.subset)
        raise UserError(f"{key}={value}: {spec.key}={spec.name}: {error}") from None
    except Exception as error:
        raise UserError(f"{spec.key}={spec.name}: the hub dataset cannot be opened ({type(error).__name__}: {error}); "
                        f"{LOCAL_ADVICE}") from None


def builder_of(path: str | Path) -> str | None:
    """The `datasets` builder for a file name, or None for one that is not read."""
    name = Path(path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return BUILDERS.get(Path(name).suffix)


def find_shards(spec: Spec, at_least: int) -> list[Shard]:
    """The shards of a source, in a fixed order.

    Args:
        spec: what to read.
        at_least: where there are fewer files than this, parquet files are split by row groups.

    Raises:
        UserError: nothing there, nothing readable, or the hub does not answer.
    """
    if spec.name == "python-docs":
        return [TopicsShard()]
    path = Path(spec.name).expanduser()
    if path.exists():
        shards = _local_shards(spec, path)
    elif builder_of(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec.name):
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise UserError(f"{spec.key}={spec.name}: there is no such file or folder{near}; give an existing one, a hub name, "
                        "or python-docs")
    else:
        spec = replace(spec, revision=_revision(spec))
        shards = [TableShard(f"{spec.name}@{spec.revision}", 0, spec)]
    if len(shards) >= at_least:
        return shards
    return [part for shard in shards for part in _split(shard, at_least)]


def _local_shards(spec: Spec, path: Path) -> list[TableShard]:
    if path.is_file() and builder_of(path) is None:
        raise UserError(f"{spec.key}={spec.name}: files of this kind are not read{READABLE}")
    root = path if path.is_dir() else path.parent
    try:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if builder_of(file) and file.is_file()]
        # An empty file holds no document, and `datasets` trips over an empty .jsonl.
        sizes = {file: file.stat().st_size for file in files}
        for file in files:
            file.open("rb").close()
    except OSError as error:
        raise UserError(f"{spec.key}={spec.name}: cannot be read ({error}); mend its permissions") from None
    if not files:
        raise UserError(f"{spec.key}={spec.name}: the folder holds no file that is read{READABLE}")
    names = {file.relative_to(root).as_posix(): file for file in files if sizes[file]}
    return [TableShard(name, sizes[names[name]], spec, str(names[name])) for name in sorted(names)]


def _split(shard: TableShard, at_least: int) -> list[TableShard]:
    """A shard in the parts that `datasets` can open by themselves: a hub dataset's files, a parquet file's row groups."""
    if shard.path is not None and not shard.path.endswith(".parquet"):
        return [shard]
    try:
        stream = shard.open()
        count = stream.num_shards
        if count < at_least:
            count = stream.reshard().num_shards
    except UserError:
        raise
    except Exception as error:
        raise _damaged(shard.spec, shard.name, error) from None
    return [replace(shard, name=f"{shard.name}#{i}" if count > 1 else shard.name, size=shard.size // count, part=(i, count))
            for i in range(count)]


def known_size(spec: Spec, shards: Sequence[Shard]) -> int | None:
    """Bytes of the source, as far as they are known without reading it."""
    if any(isinstance(shard, TableShard) and shard.path is None for shard in shards):
        splits = shards[0].open().info.splits or {}
        return splits[spec.split].num_bytes if spec.split in splits else None
    return sum(shard.size for shard in shards)
