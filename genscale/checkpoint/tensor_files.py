"""Tensors in safetensors files: written by several processes, each its pieces, and read as whole tensors by name.

A file is `<name>.safetensors` where one process writes, or `<name>-00001-of-00002.safetensors` and so on. What a process does
not have whole is stored flat as "<tensor>@<first element>", and the metadata "shapes" has the shapes of those tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genscale.errors import UserError
from genscale.parallel.pieces import Piece
from genscale.reading import Unreadable, parse_json

TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
         torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
DTYPES = {name: dtype for dtype, name in TYPES.items()}
PART = re.compile(r"^(.+)-\d{5}-of-\d{5}$")
CHUNK = 2**24
"""Bytes that are hashed and written at a time."""
BLOCK = 2**26
"""Bytes of host memory that are asked for at a time: torch rounds what a GPU is to copy to up to a power of two, which would
be up to twice the memory if it were one piece."""
SYNC_EVERY = 2**30
"""Bytes after which what was written is sent to the disk: all at the end would be one call of many minutes on a slow one."""


def part_name(name: str, rank: int, world_size: int) -> str:
    """File of one process's pieces of the tensors of a network."""
    return f"{name}.safetensors" if world_size == 1 else f"{name}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def names_in(folder: Path) -> dict[str, list[Path]]:
    """The files in a folder by the name that they are parts of, in order."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = PART.match(file.stem)
        found.setdefault(part.group(1) if part else file.stem, []).append(file)
    return found


class TensorBuffer:
    """Host memory in which the pieces of one file wait to be written, as they will lie in it. It is kept for the next save: new
    memory would cost a fault for every page again.

    Args:
        pinned: in memory from which a GPU copies by itself.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._memory: list[Tensor] = []  # blocks, one behind the other
        self._size, self._header = 0, b""

    @torch.no_grad()
    def take(self, pieces: Iterable[Piece]) -> None:
        """Copy the pieces. A copy from a GPU is not waited for."""
        present = [(_key(piece), piece) for piece in pieces if piece.whole or piece.values.numel()]
        present.sort(key=lambda item: (-item[1].values.element_size(), item[0]))  # so that all are aligned
        cut = {piece.name: piece.shape for _, piece in present if not piece.whole}
        entries = [(key, piece.values.dtype, piece.shape if piece.whole else (piece.values.numel(),)) for key, piece in present]
        self._header, self._size = _header(entries, {"shapes": json.dumps(cut)} if cut else {})
        self._reserve(self._size)
        start = 0
        for _, piece in present:
            values = piece.values.contiguous().reshape(-1).view(torch.uint8)
            for place in self._places(start, len(values)):
                place.copy_(values[:len(place)], non_blocking=True)
                values = values[len(place):]
            start += piece.values.nbytes

    def _reserve(self, size: int) -> None:
        if self._memory and len(self._memory[-1]) < min(BLOCK, size - BLOCK * (len(self._memory) - 1)):
            del self._memory[-1]  # the last one, which was cut to what there was
        for start in range(BLOCK * len(self._memory), size, BLOCK):
            self._memory.append(torch.empty(min(BLOCK, size - start), dtype=torch.uint8, pin_memory=self._pinned))

    def _places(self, start: int, size: int) -> Iterator[Tensor]:
        """The memory of bytes that may lie in several blocks."""
        end = start + size
        while start < end:
            block, offset = divmod(start, BLOCK)
            stop = min(BLOCK, offset + end - start)
            yield self._memory[block][offset:stop]
            start += stop - offset

    def write(self, file: Path, progressed: Callable[[], object] = lambda: None) -> dict[str, object]:
        """Write the file, through to the disk; its size and SHA-256. Calls `progressed` now and then. Raises OSError."""
        digest, unsynced = hashlib.sha256(), 0
        content = (place.numpy().data[at:at + CHUNK] for place in self._places(0, self._size)
                   for at in range(0, len(place), CHUNK))
        with file.open("wb") as out:
            chunks: Iterator[bytes | memoryview] = itertools.chain([self._header], content)
            for chunk in chunks:
                digest.update(chunk)
                out.write(chunk)
                unsynced += len(chunk)
                if unsynced >= SYNC_EVERY:
                    unsynced = 0
                    out.flush()
                    os.fsync(out.fileno())
                progressed()
            out.flush()
            os.fsync(out.fileno())
        return {"bytes": len(self._header) + self._size, "sha256": digest.hexdigest()}


def write_whole(file: Path, tensors: TensorFiles) -> None:
    """Write all the tensors to one file, one at a time. Raises OSError."""
    types = tensors.types()
    write_tensors(file, tensors, {name: (types[name], shape) for name, shape in tensors.shapes().items()})


def write_tensors(file: Path, read: Callable[[str], Tensor],
                  entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Write the named tensors of these types and shapes to one file, asking for one at a time. Raises OSError, and ValueError
    where one has another shape."""
    names = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
    with file.open("wb") as out:
        out.write(_header([(name, *entries[name]) for name in names], {})[0])
        for name in names:
            dtype, shape = entries[name]
            value = read(name).detach()
            if value.shape != shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, not {shape}")
            out.write(value.to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _header(entries: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: dict[str, str]) -> tuple[bytes, int]:
    """What stands before the bytes of tensors (key, dtype, shape) that lie one behind the other, and how many these are."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key, dtype, shape in entries:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _key(piece: Piece) -> str:
    return piece.name if piece.whole else f"{piece.name}@{piece.first}"


class TensorFiles:
    """The tensors of one network, its optimizer or its average, put together one at a time from the files of all who wrote.

    Raises UserError where a file cannot be read, or does not hold what the others leave out.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._places: dict[str, list[tuple[int, int, str]]] = {}  # by tensor: (first element, file, key)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, torch.dtype] = {}
        self._open = []
        for index, path in enumerate(self.files):
            try:
                if path.exists() and not path.is_file():
                    raise OSError("it is no plain file")
                file = safe_open(str(path), framework="pt")
                cut = _cut_shapes(file.metadata() or {})
            except (OSError, SafetensorError, MemoryError, RuntimeError, Unreadable) as error:
                raise UserError(f"checkpoint file {path} cannot be read: {error}") from None
            self._open.append(file)
            for key in file.keys():  # noqa: SIM118 - no mapping
                name, first = _place(key, cut)
                self._places.setdefault(name, []).append((first, index, key))
                stored = file.get_slice(key)
                self._shapes[name] = tuple(cut[name] if name in cut else stored.get_shape())
                if stored.get_dtype() not in DTYPES:
                    raise UserError(f"checkpoint file {path} cannot be read: {key} is {stored.get_dtype()}")
                self._types[name] = DTYPES[stored.get_dtype()]
        for places in self._places.values():
            places.sort()

    def keys(self) -> list[str]:
        return sorted(self._places)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def types(self) -> dict[str, torch.dtype]:
        return dict(self._types)

    def __call__(self, key: str) -> Tensor:
        """The whole tensor. Raises ValueError where there is none of that name."""
        if key not in self._places:
            raise ValueError(f"{self.files[0]} has no tensor {key}")
        parts = [(first, self._open[index].get_tensor(stored)) for first, index, stored in self._places[key]]
        shape = self._shapes[key]
        if len(parts) == 1 and parts[0][1].shape == shape:
            return parts[0][1]
        end = 0
        for first, values in parts:
            if first != end:
                break
            end += values.numel()
        if end != math.prod(shape) or first > end:
            raise UserError(f"checkpoint file {self.files[0]}: of {key} the elements from {end} on are missing")
        return torch.cat([values for _, values in parts]).view(shape)


def _cut_shapes(metadata: dict[str, str]) -> dict[str, list[int]]:
    """The shapes of the tensors that are not whole in a file. Raises Unreadable."""
    cut = parse_json(metadata.get("shapes", "{}"))
    if not isinstance(cut, dict) or not all(isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
                                            for shape in cut.values()):
        raise Unreadable("its metadata holds no shapes")
    return cut


def _place(key: str, cut: dict[str, list[int]]) -> tuple[str, int]:
    """Name and first element of what is stored as `key`."""
    name, _, first = key.rpartition("@")
    return (name, int(first)) if name in cut and re.fullmatch("[0-9]{1,18}", first) else (key, 0)
