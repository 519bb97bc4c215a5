"""Rows of an installed source as images."""

from __future__ import annotations

from typing import Any

from genscale.data.images.labels import label_of
from genscale.data.images.spec import ImageSpec, Record
from genscale.data.row_source import RowSource, SourceShard, shard_names
from genscale.data.shard import Shard
from genscale.errors import UserError


class ImageSourceShard(SourceShard):
    """A shard of an installed source, with a column of images."""

    spec: ImageSpec

    def documents(self, table: Any, first: int, start: int, step: int) -> list[Record]:
        images = table.columns[self.spec.image][start::step]
        labels = table.columns[self.spec.label][start::step] if self.spec.label else [None] * len(images)
        names = (f"row {first + start + i * step} of {self.name}" for i in range(len(images)))
        return [Record(name, self._content(image, name), label_of(label))
                for name, image, label in zip(names, images, labels, strict=True)]

    def _content(self, image: Any, row: str) -> bytes:
        if not isinstance(image, (bytes, type(None))):
            raise UserError(f"data.image_column={self.spec.image}: {row} of {self.spec.where} holds {image!r:.60}, not the "
                            "bytes of an image file")
        return image or b""


def source_shards(source: RowSource, spec: ImageSpec) -> tuple[list[Shard], list[Shard]]:
    """The shards of an installed source to train on, and those to validate on. Raises UserError."""
    training, validation = shard_names(source, spec)
    return ([ImageSourceShard(name, spec, source) for name in training],
            [ImageSourceShard(name, spec, source) for name in validation])
