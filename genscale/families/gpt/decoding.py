"""Drawing text from a language model, a token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import UserError
from genscale.families.gpt.attention import KeyValueCache


class Drawing(TypedDict, total=False):
    """How the next token is chosen: see `stream`."""

    temperature: float
    top_k: int | None
    top_p: float | None


LEAST_DIVISOR = 1e-30
"""Logits over a lower temperature may leave fp32."""


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits `(batch, vocab_size)` with all but the likeliest tokens at minus infinity.

    Args:
        logits: already divided by the temperature.
        top_k: keep this many (Fan et al. 2018), more where the last ones are equal.
        top_p: then keep the fewest of the likeliest that hold at least this probability (Holtzman et al. 2020, nucleus).
    """
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # A token stays while those before it have not filled the nucleus; before the likeliest there is nothing.
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        outside[:, 0] = False  # also where top_p is below what fp32 holds
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row `(batch,)` for logits `(batch, vocab_size)`; temperature 0 takes the likeliest.

    Raises:
        UserError: the logits are no numbers.
    """
    if not logits.isfinite().all():
        raise UserError("model: what the network predicts is no number: its weights have diverged; take an earlier checkpoint "
                        "(--step), or train with a lower optimizer.lr")
    if temperature == 0:
        return logits.argmax(-1)
    if temperature < LEAST_DIVISOR:
        logits = (logits - logits.amax(-1, keepdim=True)).double()
    probabilities = filter_logits((logits / temperature).float(), top_k, top_p).softmax(-1)
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)])


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, list[int]]:
    """Prompts of any lengths (at least one token each) as `(batch, time)` int64, each at the right end of its row, and their
    lengths: the arguments `tokens` and `lengths` of `stream` and `generate`."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[len(row) - len(prompt):] = torch.as_tensor(prompt)
    return tokens.to(device), lengths


def growing(network: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Contexts of forwards that read one token more each turn: nothing is prepared for a length that does not come again.

    Compiled blocks would be compiled anew for each, and slower ones be left behind for training: they run as they are written.
    cuDNN's attention makes a plan for each: a GPU's other kernels, which need none, take its place.
    """
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    stance: Callable[[], AbstractContextManager[object]]
    stance = partial(torch.compiler.set_stance, "force_eager") if compiled else nullcontext
    return partial(_growing, stance)


@contextmanager
def _growing(stance: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    planned = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with stance():
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(planned)


class _Reader:
    """Logits after growing rows of tokens. Keys and values of what was read are kept while the rows fit into the positions.

    A longer window slides: every token moves to another position, so nothing computed for the last one holds for the next.
    """

    def __init__(self, network: nn.Module, positions: int, layers: int | None, capacity: int) -> None:
        self.network, self.positions = network, positions
        self.options = {} if layers is None else {"last": 1}
        self.cache = None if layers is None else KeyValueCache(layers, min(capacity, positions))
        self.growing = growing(network)

    def __call__(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """Logits `(batch, vocab_size)` after `tokens` `(batch, time)`: those of the call before and what came to them."""
        if tokens.shape[1] > self.positions:
            self.cache = None
        seen = slice(-self.positions, None) if self.cache is None else slice(self.cache.length, None)
        options: dict[str, Any] = dict(self.options)
        if self.cache is not None:
            options["cache"] = self.cache
        if documents is not None:
            options["documents"] = documents[:, seen]
        with self.growing():
            return self.network(tokens[:, seen], **options)[:, -1]


@torch.no_grad()
def stream(network: nn.Module, tokens: Tensor, max_new_tokens: int, *, positions: int, generators: Sequence[torch.Generator],
           layers: int | None = None, lengths: Sequence[int] | None = None, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None, end_of_text: int | None = None, vocab_size: int | None = None) -> Iterator[Tensor]:
    """Continue prompts by up to `max_new_tokens` tokens, one a turn: yields `(batch,)` int64 on the CPU as they are drawn.

    A network spread over processes is driven by all of them alike; `end_of_text` must then be None, lest one stop early.

    Args:
        network: a language model, wrapped or not: tokens `(batch, time)` to logits `(batch, time, vocab_size)`.
        tokens: `(batch, time)` int64 prompts of at least one token.
        positions: longest sequence the network reads; a longer one slides, its oldest tokens forgotten.
        generators: one CPU generator a row, so that a row does not depend on how many stand beside it.
        layers: blocks of a `GPT`, whose keys and values are then kept: the same result, sooner. None: any network, and the
            whole window is computed anew for each token.
        lengths: tokens at the end of each row that are its prompt; what stands before is padding, a document of its own, so
            the network must be a `GPT`. None: all of them.
        temperature: divides the logits; 0 is greedy.
        top_k, top_p: see `filter_logits`.
        end_of_text: a row that drew it is filled up with it, and all stop once every row has. None: never stop early.
        vocab_size: tokens from here on are padding of the embedding table and are never drawn.
    """
    time = tokens.shape[1]
    documents = None
    if lengths is not None and min(lengths) < time:
        starts = time - torch.tensor(lengths, device=tokens.device)
        documents = (torch.arange(time, device=tokens.device) >= starts[:, None]).long()
    reader = _Reader(network, positions, layers, capacity=time + max_new_tokens)
    finished = torch.zeros(len(tokens), dtype=torch.bool)
    was_training = network.training
    network.eval()
    try:
        for _ in range(max_new_tokens):
            # Chosen on the CPU, in fp32, so that the draws are the same ones whatever the device.
            drawn = choose(reader(tokens, documents)[:, :vocab_size].float().cpu(), temperature, top_k, top_p, generators)
            if end_of_text is not None:
                drawn = drawn.masked_fill(finished, end_of_text)
                finished |= drawn == end_of_text
            yield drawn
            if finished.all():
                break
            tokens = torch.cat([tokens, drawn[:, None].to(tokens.device)], dim=1)
            if documents is not None:
                documents = F.pad(documents, (0, 1), value=1)
    finally:
        network.train(was_training)


def generate(network: nn.Module, tokens: Tensor, max_new_tokens: int, *, positions: int, generators: Sequence[torch.Generator],
             **settings: Any) -> Tensor:
    """Prompts with their continuations, `(batch, time + new)` int64 on the device of `tokens`; arguments as of `stream`."""
    drawn = list(stream(network, tokens, max_new_tokens, positions=positions, generators=generators, **settings))
    return torch.cat([tokens, torch.stack(drawn, dim=1).to(tokens.device)], dim=1)
