"""Whether the sources of a run can be read from here, without reading more than their first row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genscale.data import readers
from genscale.data.folders import refuse_no_file
from genscale.data.images import sources as image_sources
from genscale.data.images.data import image_specs
from genscale.data.images.settings import DIGITS, ImageDataSettings
from genscale.data.images.shards import look
from genscale.data.images.spec import ImageSpec
from genscale.data.source_file import is_url
from genscale.data.spec import Spec
from genscale.data.text.settings import TextDataSettings, readings, validation_reading
from genscale.errors import UserError


def reach(settings: Any) -> Iterator[str]:
    """A line for each source that the data section names and that answers; none for data that is made, not read.

    Raises:
        UserError: the first one that does not answer, or that holds nothing that can be read.
    """
    if isinstance(settings, TextDataSettings):
        specs = [reading.spec for reading in readings(settings)]
        for spec in [*specs, validation_reading(settings)] if settings.validation_source else specs:
            yield _text(spec)
    elif isinstance(settings, ImageDataSettings):
        for spec in image_specs(settings):
            yield _images(spec)


def _text(spec: Spec) -> str:
    shards = readers.find_shards(spec, at_least=1)
    if not any(next(shard.rows(), None) for shard in shards):
        raise UserError(f"{spec.key}={spec.name}: holds no text; give one with text")
    return f"{spec.name}: {_parts(len(shards))}"


def _images(spec: ImageSpec) -> str:
    path = Path(spec.name).expanduser()
    if spec.name == DIGITS:
        return DIGITS
    if not spec.locations and not is_url(spec.name) and path.exists():
        files = [path] if not path.is_dir() else [path / file.name for file in look(path, spec).files]
        if not files:
            raise UserError(f"{spec.where}: the folder holds no image; give one with images")
        refuse_no_file(path, spec.where)
        try:
            files[0].open("rb").close()
        except OSError as error:
            raise UserError(f"{spec.where}: cannot be read ({error}); mend its permissions") from None
        return f"{spec.name}: {_parts(len(files))}"
    training, validation = image_sources.find_shards(spec)
    return f"{spec.name}: {_parts(len(training) + len(validation))}"


def _parts(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"
