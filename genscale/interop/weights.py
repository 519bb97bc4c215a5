"""The weights of a GPT under the names and in the layout of transformers' classes, read and written a tensor at a time."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from genscale.errors import UserError
from genscale.families.gpt.network import GPT
from genscale.families.gpt.settings import GPTSettings, ResolvedGPTSettings
from genscale.reading import Unreadable, read_json

log = logging.getLogger("genscale")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest file written, as transformers 4 has it."""
FLOATS = {"F64", "F32", "F16", "BF16"}
PREFIX = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model."}
TOP = {"gpt2": {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"},
       "llama": {"token_embedding": "embed_tokens", "final_norm": "norm"}}
BLOCKS = {"gpt2": "h", "llama": "layers"}
BLOCK = {
    "gpt2": {"attention_norm": ["ln_1"], "attention.query_key_value": ["attn.c_attn"], "attention.output": ["attn.c_proj"],
             "mlp_norm": ["ln_2"], "mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"]},
    "llama": {"attention_norm": ["input_layernorm"],
              "attention.query_key_value": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
              "attention.query_norm": ["self_attn.q_norm"], "attention.key_norm": ["self_attn.k_norm"],
              "attention.output": ["self_attn.o_proj"], "mlp_norm": ["post_attention_layernorm"], "mlp.up": ["mlp.up_proj"],
              "mlp.gate": ["mlp.gate_proj"], "mlp.down": ["mlp.down_proj"]},
}
TOP["qwen3"], BLOCKS["qwen3"], BLOCK["qwen3"] = TOP["llama"], BLOCKS["llama"], BLOCK["llama"]  # its two norms stand there too
HEAD = "lm_head.weight"
UNUSED = re.compile(r"(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
"""Tensors that hold no weights: buffers that older versions of transformers saved too."""
CHUNK = 2**24
"""Elements that are compared at a time."""
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Piece:
    """A tensor of theirs: `rows` of one of ours, turned where their layers hold (in, out) as GPT-2's Conv1D do."""

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def rows(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]


def shapes(settings: GPTSettings, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of ours by name; takes no memory."""
    with torch.device("meta"):
        network = GPT(settings, vocab_size)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def pieces(kind: str, settings: ResolvedGPTSettings, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The tensors of theirs that, one below the other, make our parameter `name`.

    Args:
        kind: their `model_type`.
        shape: of ours.
    """
    module, _, leaf = name.rpartition(".")
    if module == "output":
        return [Piece("lm_head.weight", shape, False)]
    if module in TOP[kind]:
        return [Piece(f"{PREFIX[kind]}{TOP[kind][module]}.{leaf}", shape, False)]
    _, layer, part = module.split(".", 2)
    theirs = [f"{PREFIX[kind]}{BLOCKS[kind]}.{layer}.{other}.{leaf}" for other in BLOCK[kind][part]]
    if len(theirs) == 3:
        shared = settings.kv_heads * settings.head_width
        rows = (settings.heads * settings.head_width, shared, shared)
        return [Piece(other, (count, *shape[1:]), False) for other, count in zip(theirs, rows, strict=True)]
    transposed = kind == "gpt2" and len(shape) == 2
    return [Piece(theirs[0], tuple(reversed(shape)) if transposed else shape, transposed)]


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, of one file or several, read one at a time.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.
        name: of the folder, for messages.

    Raises:
        UserError: no such file, a shard that is missing, or a damaged one.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        if (folder / SINGLE).is_file():
            files = [SINGLE]
        elif (folder / INDEX).is_file():
            files = self._shards()
        else:
            pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
            why = f" ({pickled[0]} is a pickle, which is not read: convert it)" if pickled else ""
            raise UserError(f"model.from: {name} holds no {SINGLE} and no {INDEX}{why}; save the model with transformers' "
                            "save_pretrained")
        self._file_of: dict[str, safe_open] = {}
        for file in files:
            keys, opened = self._open(file)
            if twice := next((key for key in keys if key in self._file_of), None):
                raise UserError(f"model.from: {name}: {twice} is in {file} and in another file too; copy the folder again")
            self._file_of |= dict.fromkeys(keys, opened)

    def _shards(self) -> list[str]:
        """The files that the index names: of this folder, whatever it names them."""
        try:
            files = set(read_json(self.folder / INDEX)["weight_map"].values())
        except (OSError, Unreadable, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"model.from: {self.name}: {INDEX} is damaged ({error}); copy the folder again") from None
        for file in files:
            if not isinstance(file, str) or file != Path(file).name or file in ("", "..") or "\0" in file:
                raise UserError(f"model.from: {self.name}: {INDEX} names {file!r}, which is no file of this folder; copy the "
                                "folder again")
        return sorted(files)

    def _open(self, file: str) -> tuple[list[str], safe_open]:
        try:
            if (self.folder / file).exists() and not (self.folder / file).is_file():
                raise OSError("no plain file")
            opened = safe_open(str(self.folder / file), framework="pt")
            return list(opened.keys()), opened
        except FileNotFoundError:
            raise UserError(f"model.from: {self.name}: {file}, named in {INDEX}, is missing; copy the folder again") from None
        except (OSError, SafetensorError, MemoryError, RuntimeError) as error:  # a file of more than there are addresses for
            raise UserError(f"model.from: {self.name}: {file} is damaged ({error}); copy the folder again") from None

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file_of[key].get_slice(key).get_shape())

    def kind(self, key: str) -> str:
        """F32, BF16, ... as the file's header has it."""
        return self._file_of[key].get_slice(key).get_dtype()

    def __call__(self, key: str) -> Tensor:
        return self._file_of[key].get_tensor(key)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are, without holding them."""
        if (shape := self.shape(one)) != self.shape(other) or self.kind(one) != self.kind(other):
            return False
        slices = [self._file_of[key].get_slice(key) for key in (one, other)]
        rows = max(1, CHUNK // max(1, math.prod(shape[1:])))
        return all(torch.equal(*(values[start:start + rows] for values in slices)) for start in range(0, shape[0], rows))


def has_a_head_of_its_own(kind: str, source: SafetensorsFolder) -> bool:
    """Whether the folder holds an output layer beside the token embedding, and another one."""
    embedding = _embedding(kind, source)
    return HEAD in source and embedding in source and not source.equal(HEAD, embedding)


def _embedding(kind: str, source: SafetensorsFolder) -> str:
    return f"{'' if _is_bare(kind, source) else PREFIX[kind]}{TOP[kind]['token_embedding']}.weight"


def _is_bare(kind: str, source: SafetensorsFolder) -> bool:
    """Files saved from the model without its head (GPT-2's own on the hub) have the names without the prefix."""
    return not any(key.startswith(PREFIX[kind]) for key in source)


def read_weights(kind: str, settings: ResolvedGPTSettings, vocab_size: int, source: SafetensorsFolder) -> Read:
    """`read(name)` of our parameters, full fp32 CPU tensors of the folder's shape; every header is checked now.

    Raises:
        UserError: names the tensors that are missing, of another shape, or no floating-point numbers.
    """
    bare, embedding = _is_bare(kind, source), _embedding(kind, source)
    head_alone = settings.tied and embedding not in source  # under the other of the two names of what is shared
    found, missing, wrong = {}, [], []
    for name, shape in shapes(settings, vocab_size).items():
        found[name] = [replace(piece, name=piece.name.removeprefix(PREFIX[kind])) if bare else piece
                       for piece in pieces(kind, settings, name, shape)]
        if head_alone and found[name][0].name == embedding and HEAD in source:
            found[name] = [replace(found[name][0], name=HEAD)]
        for piece in found[name]:
            if piece.name not in source:
                missing.append(piece.name)
            elif source.shape(piece.name) != piece.shape or source.kind(piece.name) not in FLOATS:
                wrong.append(f"{piece.name} is {source.kind(piece.name)} {list(source.shape(piece.name))}, not a "
                             f"floating-point {list(piece.shape)}")
    if missing:
        raise UserError(f"model.from: {source.name}: weights are missing that config.json calls for: {_first(missing)}; "
                        f"copy the folder again, or save the whole model")
    if wrong:
        raise UserError(f"model.from: {source.name}: weights are not what config.json says: {_first(wrong)}")

    used = {piece.name for parts in found.values() for piece in parts}
    unused = sorted(key for key in source if key not in used and not UNUSED.search(key) and not (settings.tied and key == HEAD))
    if unused:
        log.warning("model.from: %s: of its tensors %d %s not used, for this model has none like it: %s", source.name,
                    len(unused), "is" if len(unused) == 1 else "are", _first(unused))

    def read(name: str) -> Tensor:
        parts = [source(piece.name).float() for piece in found[name]]
        parts = [part.T if piece.transposed else part for part, piece in zip(parts, found[name], strict=True)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    return read


def _first(words: list[str], count: int = 3) -> str:
    return ", ".join(words[:count]) + (f" and {len(words) - count} more" if len(words) > count else "")


def write_weights(kind: str, settings: ResolvedGPTSettings, vocab_size: int, read: Read, dtype: torch.dtype, folder: Path,
                  shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` and their index. Holds one file's tensors at a time.

    Args:
        read: our parameters by name.

    Raises:
        OSError: a full disk.
    """
    # GPT-2's class always has biases; where ours has none, zeros do the same.
    wanted = shapes(replace(settings, bias=True) if kind == "gpt2" else settings, vocab_size)
    ours = shapes(settings, vocab_size)
    files = _share_out({name: dtype.itemsize * torch.Size(shape).numel() for name, shape in wanted.items()}, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for name in names:
            value = read(name) if name in ours else torch.zeros(wanted[name])
            parts = pieces(kind, settings, name, wanted[name])
            for piece, part in zip(parts, value.split([piece.rows for piece in parts]), strict=True):
                tensors[piece.name] = (part.T if piece.transposed else part).to(dtype).contiguous()
        try:
            save_file(tensors, str(folder / file), metadata={"format": "pt"})
        except SafetensorError as error:  # wraps "No space left on device"
            raise OSError(f"{file}: {error}") from None
        (folder / file).chmod(0o644)  # the library keeps its files to their owner; models are shared
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _share_out(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in files of at most `most` bytes (a larger tensor has a file of its own), in order."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > most:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files
