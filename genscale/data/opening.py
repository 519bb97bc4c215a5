"""Opening one location as a stream of Arrow tables through `datasets`: a local file, a URL or a Hugging Face hub dataset.

Whether a URL or the hub answers is asked first and once: `datasets` would retry for minutes before it gives up.
"""

from __future__ import annotations

import glob
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from genscale.data.columns import Spec
from genscale.errors import UserError

BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
READABLE = "; .txt, .jsonl and .parquet are read, plain or compressed (.gz .zst .xz .bz2)"
HUB_SECONDS = 10.0
"""Longest wait for the hub's first answer."""
URL_SECONDS = 10.0
"""Longest wait for a web server's first answer."""
PROBES = 16
"""URLs that are asked at a time."""
CHUNK = 2**20
"""Bytes read at a time: every lane keeps as many in memory."""
WEB = {"block_size": 2 * CHUNK, "cache_type": "blockcache", "cache_options": {"maxblocks": 3}}
"""How a file is fetched: in blocks, of which the last few are kept. The JSON reader steps back after each line that it looks
for; fsspec's own cache forgets what lies behind, and would fetch every byte eleven times."""
STREAM = {"block_size": 0}
"""The same from a server that gives no parts of a file: from front to back."""


def is_url(name: str) -> bool:
    """Whether a source is read over HTTP."""
    return name.startswith(("http://", "https://"))


def builder_of(path: str | Path) -> str | None:
    """The `datasets` builder for a file name or URL, or None for one that is not read."""
    name = Path(url_path(str(path)) if is_url(str(path)) else path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return BUILDERS.get(Path(name).suffix)


def is_plain_parquet(path: str) -> bool:
    """Whether the columns and row groups of a parquet file can be read by themselves."""
    return (url_path(path) if is_url(path) else path).lower().endswith(".parquet")


def url_path(url: str) -> str:
    """The path in a URL, without what asks for it (`?token=...`)."""
    return unquote(urlsplit(url).path)


def quiet_datasets() -> Any:
    """`datasets`, without the progress bars and log lines that would stand beside our own one-line errors."""
    import datasets

    # It would send a request to the hub each time that a local file is opened, and wait for the answer.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def open_file(path: str, spec: Spec, name: str, ranges: bool = True) -> Any:
    """The stream of a local file, or of a URL whose server gives parts of a file (`ranges`) or does not.

    Raises:
        UserError: a column is not there (parquet; other files tell when they are read).
    """
    builder = builder_of(path)
    options: dict[str, Any] = {}
    if builder == "text":
        if is_url(path) and url_path(path).lower().endswith(".txt"):
            rows = {"url": path, "document": spec.document, "ranges": ranges}
            return quiet_datasets().IterableDataset.from_generator(_plain_text, gen_kwargs=rows)
        options["sample_by"] = "document" if spec.document == "file" else spec.document
    if builder == "parquet" and is_plain_parquet(path):
        # Columns nobody asked for are not decoded.
        if error := spec.unknown_columns(name, _parquet_columns(path)):
            raise error
        options["columns"] = spec.columns
    if builder != "parquet":
        options["chunksize"] = CHUNK
    # Escaped: `datasets` takes a path for a pattern.
    files = {"train": [path if is_url(path) else glob.escape(path)]}
    if is_url(path):
        options["storage_options"] = {protocol: dict(WEB if ranges else STREAM) for protocol in ("http", "https")}
    return quiet_datasets().load_dataset(builder, data_files=files, split="train", streaming=True, **options)


def _parquet_columns(path: str) -> list[str]:
    import pyarrow.parquet

    if not is_url(path):
        return pyarrow.parquet.read_schema(path).names
    with open_url(path, "rb") as file:
        return pyarrow.parquet.read_schema(file).names


def open_url(url: str, mode: str, ranges: bool = True, **options: Any) -> Any:
    """The file at a URL, to be entered with `with`; without `ranges` it is read from front to back."""
    import fsspec

    # Proxies are those that the environment names.
    return fsspec.open(url, mode, client_kwargs={"trust_env": True}, **(WEB if ranges else STREAM), **options)


def _plain_text(url: str, document: str, ranges: bool) -> Iterator[dict[str, str]]:
    """The rows that `datasets` makes of a text file. Its own way to open one passes the encoding on to the web client, which
    knows no such option."""
    with open_url(url, "rt", ranges, encoding="utf-8") as file:
        if document == "file":
            yield {"text": file.read()}
        elif document == "line":
            yield from ({"text": line.rstrip("\n")} for line in file)
        else:
            rest = ""
            while chunk := file.read(CHUNK):
                *paragraphs, rest = (rest + chunk).split("\n\n")
                yield from ({"text": paragraph} for paragraph in paragraphs if paragraph)
            if rest:
                yield {"text": rest}


@lru_cache(maxsize=4)
def open_hub(spec: Spec) -> Any:
    """The stream of a hub dataset.

    Raises:
        UserError: no such subset or split, or the hub does not answer.
    """
    datasets = quiet_datasets()
    try:
        return datasets.load_dataset(spec.name, spec.subset, split=spec.split, revision=spec.revision, streaming=True)
    except ValueError as error:
        setting, value = ("split", spec.split) if "split" in str(error).lower() else ("subset", spec.subset)
        raise UserError(f"{spec.setting(setting)}={value}: {spec.key}={spec.name}: {error}") from None
    except Exception as error:
        raise UserError(f"{spec.key}={spec.name}: the hub dataset cannot be opened ({type(error).__name__}: {error}); "
                        f"{spec.local_advice}") from None


def hub_revision(spec: Spec) -> str:
    """The hub dataset's present commit.

    Raises:
        UserError: no such dataset, no access to it, or the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    where = f"{spec.key}={spec.name}: there is no such path here, and"
    try:
        return HfApi().dataset_info(spec.name, timeout=HUB_SECONDS).sha
    except GatedRepoError:
        raise UserError(f"{where} access to this hub dataset must be granted; accept its terms on the hub and set HF_TOKEN, "
                        f"or {spec.local_advice}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{where} no such dataset on the Hugging Face hub (a private one needs HF_TOKEN); "
                        f"{spec.local_advice}") from None
    except Exception as error:  # each transport of the hub client has exceptions of its own
        raise UserError(f"{where} the Hugging Face hub cannot be reached ({type(error).__name__}; is HF_HUB_OFFLINE set, "
                        f"or the network down?); {spec.local_advice}") from None


def ask_urls(spec: Spec, urls: Sequence[str]) -> list[tuple[int, bool]]:
    """Bytes of what stands at each URL, 0 where the server does not say, and whether it gives parts of a file.

    Raises:
        UserError: the first URL that does not answer, and why.
    """
    def answer(url: str) -> tuple[int, bool] | UserError:
        try:
            return _ask_url(spec, url)
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(PROBES, len(urls))) as pool:
        answers = list(pool.map(answer, urls))
    for answered in answers:
        if isinstance(answered, UserError):
            raise answered
    return answers


def _ask_url(spec: Spec, url: str) -> tuple[int, bool]:
    refusal = partial(_url_error, spec, url)
    # Addresses signed for reading answer to GET alone: one byte is asked for, and the size stands beside it.
    request = urllib.request.Request(url, headers={"Range": "bytes=0-0", "Accept-Encoding": "identity"})
    try:
        with urllib.request.urlopen(request, timeout=URL_SECONDS) as response:
            total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
            ranges = response.status == 206
            if not ranges and (is_plain_parquet(url) or url_path(url).endswith(".jsonl")):
                raise refusal("the server does not give parts of a file", "give a compressed one (.jsonl.zst), or a local copy")
            return int(total) if total.isdigit() else 0, ranges
    except urllib.error.HTTPError as error:
        if error.code == 416:  # an empty file has no first byte
            return 0, True
        raise refusal(f"the server answers {error.code} {error.reason}", {
            401: "give an address that needs no password", 403: "give an address that needs no password",
            404: "there is nothing at this address; mend it", 410: "there is nothing at this address; mend it",
        }.get(error.code, "try again later, or give a local copy")) from None
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, socket.gaierror):
            raise refusal(f"the name {urlsplit(url).hostname} does not resolve",
                          "mend the address, check the network, or give a local copy") from None
        raise refusal(str(getattr(reason, "strerror", None) or reason),
                      "mend the address, check that the server runs, or give a local copy") from None
    except (OSError, HTTPException, ValueError) as error:
        raise refusal(f"{type(error).__name__}: {error}", "mend the address, or give a local copy") from None


def _url_error(spec: Spec, url: str, reason: str, advice: str) -> UserError:
    return UserError(f"{spec.key}={url}: cannot be read ({reason}); {advice}")
