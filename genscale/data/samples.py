"""What a user's own data set gives, as samples: named arrays that can be stacked, the same whenever they are read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from genscale.data.lanes import Sample
from genscale.data.order import fingerprint
from genscale.errors import UserError

MakeSample = Callable[[Any], Any]
NUMBERS = "biufc"
"""Kinds of arrays (NumPy's letters) that can be sent to a device."""
FIELDS = ("x", "y", "z")
"""Names of what a data set gives without names: an item alone is x, a pair x and y."""


class SampleMaker:
    """Turns the items of a data set into samples of arrays, each field of the shape that it has in the first sample.

    A mapping keeps its names; a tuple of up to three becomes the fields x, y and z; anything else is x. Tensors, arrays,
    pictures of Pillow, numbers and lists of numbers become arrays (Python's floats fp32).

    Args:
        make: turns an item into one of these, where it is none or another is wanted (text into tokens).
    """

    def __init__(self, make: MakeSample | None = None) -> None:
        self._make = make
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def __call__(self, item: Any) -> Sample:
        """The sample of an item. Raises UserError for what is no number, or does not stack."""
        made = item if self._make is None else self._make(item)
        if not isinstance(made, Mapping):
            several = isinstance(made, tuple) and len(made) <= len(FIELDS)
            made = dict(zip(FIELDS, made, strict=False)) if several else {"x": made}
        sample = {str(name): _array(str(name), value) for name, value in made.items()}
        shapes = {name: array.shape for name, array in sample.items()}
        if self._shapes is None:
            if not sample or "sample" in sample:
                raise UserError(f"data: a sample has the fields {list(sample)}; it needs at least one, and none called "
                                "'sample' (its number in the run goes by that name)")
            self._shapes = shapes
        if shapes != self._shapes:
            raise UserError(f"data: samples do not stack: one has {_in_words(shapes)}, the first {_in_words(self._shapes)}; "
                            "pad or crop them to one shape in `sample`")
        return sample


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.asarray(value, dtype=object)
    if array.dtype.kind not in NUMBERS:
        kind = type(value).__name__
        raise UserError(f"data: field '{name}' of a sample is {kind}, which is no array of numbers; turn it into one in "
                        "`sample` (as `sample=lambda item: {...}`)")
    if array.dtype == np.float64 and not isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        array = array.astype(np.float32)  # as torch reads Python's numbers
    return array


def _in_words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def content_of(samples: Iterable[Sample]) -> str:
    """16 hexadecimal digits of the samples' content."""
    total = 0
    for number, sample in enumerate(samples):
        total += fingerprint(number, sample)
    return f"{total % 2**64:016x}"


def check_repeatable(read: Callable[[], Sample], where: str) -> None:
    """Raises UserError where a sample is another one whenever it is read, as those are that draw random numbers: no resume and
    no other number of processes would see the same.

    Args:
        read: reads one sample.
        where: what it reads, for the message.
    """
    before = _random_states()
    first = fingerprint(0, read())
    if _random_states() != before or fingerprint(0, read()) != first:
        raise UserError(f"data: {where} draws random numbers, so a run could not be repeated or resumed; augment in the loss, "
                        "with `draws`, whose numbers belong to a sample")


def _random_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state(legacy=False)["state"]
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(),
            numpy_state["key"].tobytes() if "key" in numpy_state else repr(numpy_state), numpy_state.get("pos"))
