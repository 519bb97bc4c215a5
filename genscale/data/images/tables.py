"""Parquet files and hub datasets with a column of images, local or by URL, as shards of records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from genscale.data.file_tables import HELD, ROWS, At, Rows, open_parquet, parquet_rows
from genscale.data.images.labels import Label, composed, label_of
from genscale.data.images.paths import content_at
from genscale.data.images.spec import ImageSpec, Record
from genscale.data.readers import TableShard, damaged
from genscale.data.source_file import SourceFile
from genscale.errors import UserError

TABLE_BYTES = 2**27
"""Bytes of images in memory at a time, as they are in a table of values that were packed to less than a `GROWTH`th."""
GROWTH = 4


class ImageTableShard(TableShard):
    """A parquet file or a hub dataset, or one of its parts, with a column of images."""

    spec: ImageSpec

    def open(self) -> Any:
        import datasets

        try:
            stream = super().open()
        except UserError:
            raise
        except Exception as error:
            raise damaged(self, error) from None
        features = stream.features or {}
        if features and (unknown := self.spec.unknown_columns(self.name, list(features))):
            raise unknown
        if isinstance(features.get(self.spec.image), datasets.Image):  # else other formats than parquet are decoded and encoded
            stream = stream.cast_column(self.spec.image, datasets.Image(decode=False))
        return stream.select_columns(self.spec.columns) if features else stream

    def class_names(self) -> list[str] | None:
        """Names that the label column brings along."""
        if self.file is None:
            feature = (self.open().features or {}).get(self.spec.label)
            return list(feature.names) if feature is not None and hasattr(feature, "names") else None
        try:
            with open_parquet(self.file) as opened:
                self.check_columns(opened.schema_arrow.names)
                names = _names_of((opened.schema_arrow.metadata or {}).get(b"huggingface"), self.spec.label)
                return list(names) if names else None
        except UserError:
            raise
        except Exception as error:
            raise damaged(self, error) from None

    def _file_tables(self, start: int, at: At | None) -> Iterator[Rows]:
        group = self.part[0] if self.part[1] > 1 else None
        assert self.file is not None
        at_once = _rows_at_once(self.file, self.name, self.spec)
        return parquet_rows(self.file, self.spec.columns, self.check_columns, group, HELD, start, at_once)

    def documents(self, table: Any, first: int, start: int, step: int) -> list[Record]:
        import pyarrow as pa

        spec = self.spec
        if error := spec.unknown_columns(self.name, table.column_names):
            raise error
        rows = table.take(pa.array(range(start, len(table), step), pa.int64()))
        kind = rows[spec.image].type
        if not _holds_images(kind):
            raise UserError(f"data.image_column={spec.image}: in {self.name} of {spec.where} it holds {kind}, not the bytes of "
                            f"image files; the columns are {', '.join(table.column_names)}")
        labels = self._labels(rows) if spec.label else [None] * len(rows)
        records = zip(rows[spec.image].to_pylist(), labels, strict=True)
        names = (f"row {first + start + i * step} of {self.name}" for i in range(len(rows)))
        return [Record(name, self._content(image, name), label) for name, (image, label) in zip(names, records, strict=True)]

    def _labels(self, rows: Any) -> list[Label]:
        """Numbers that the table itself has names for are these names, but where the classes are given by others: each table
        counts its own."""
        labels = [label_of(label) for label in rows[self.spec.label].to_pylist()]
        names = _names_of((rows.schema.metadata or {}).get(b"huggingface"), self.spec.label)
        if not names:
            return labels
        if self.spec.renames and not {composed(name) for name in self.spec.classes or ()}.intersection(names):
            return [None if label == -1 else label for label in labels]
        return [names[label] if isinstance(label, int) and 0 <= label < len(names) else None if label == -1 else label
                for label in labels]

    def _content(self, image: Mapping[str, Any] | bytes | None, row: str) -> bytes:
        """What is in a cell: a file's bytes, or a struct of bytes and a path, of which one may be missing."""
        if not isinstance(image, Mapping):
            return image or b""
        if image.get("bytes") is None and image.get("path"):
            try:
                return content_at(image["path"], self, row)
            except UserError:
                raise
            except Exception as error:
                raise damaged(self, error) from None
        return image.get("bytes") or b""


@lru_cache
def _names_of(metadata: bytes | None, column: str) -> tuple[str, ...] | None:
    """The names of a column's classes in what `datasets` writes about a table."""
    try:
        names = json.loads(metadata or b"{}")["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):  # of a stranger's making, or of another kind of column
        return None
    return tuple(composed(str(name)) for name in names) if isinstance(names, list) else None


@lru_cache
def _rows_at_once(file: SourceFile, name: str, spec: ImageSpec) -> int:
    """Rows of a parquet file that fit into memory whatever is in them: a value that is stored once may be in each.

    Raises:
        UserError: its images are too large.
    """
    largest = 1
    with open_parquet(file) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
        kind = schema.field(spec.image).type if spec.image in schema.names else None
        width = getattr(kind, "byte_width", 0) if str(kind).startswith("fixed_size_binary") else 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [column for column in (group.column(i) for i in range(group.num_columns))
                       if column.path_in_schema.split(".")[0] == spec.image]
            stored = sum(column.total_uncompressed_size for column in columns)
            if max(width, stored / max(1, group.num_rows)) > spec.max_image_bytes:
                raise UserError(f"{spec.where}: the images of {name} are too large: {stored:,} bytes in {group.num_rows:,} "
                                f"rows, and data.max_image_bytes={spec.max_image_bytes:,}; raise that, or remove it")
            grows = stored > GROWTH * sum(column.total_compressed_size for column in columns)  # which images do not
            largest = max(largest, width, stored if grows else 1)
    return max(1, min(ROWS, TABLE_BYTES // largest))


def _holds_images(kind: Any) -> bool:
    """Whether a column's type is that of an image file's bytes, or of a struct with them or a path."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if "bytes" not in fields:
            return False
        return _holds_images(fields["bytes"]) and not (pa.types.is_null(fields["bytes"]) and "path" not in fields)
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    types = pa.types
    tests = (types.is_null, types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)
