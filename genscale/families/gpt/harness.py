"""A trained language model in EleutherAI's lm-evaluation-harness, an extra: `pip install 'genscale[eval]'`.

Gao et al. 2024, "The language model evaluation harness"; numbers are made as its own Hugging Face model makes them.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
import yaml
from tqdm import tqdm

from genscale.data.text.tokenizers import Tokenizer
from genscale.errors import UserError
from genscale.families.gpt.decoding import Drawing, left_padded, stream
from genscale.families.gpt.generation import GrowingText
from genscale.families.gpt.network import GPT
from genscale.families.gpt.task_files import refuse_code, templates_in_a_sandbox
from genscale.reading import Unreadable
from genscale.rng import torch_generator

try:
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as missing:
    raise UserError(f"--tasks: needs lm-evaluation-harness, which is not installed ({missing}); pip install 'genscale[eval]'") \
        from None

DEFAULT_NEW_TOKENS = 256
"""Tokens written at most where a task does not say: the harness's own default."""
Window = tuple[list[int], list[int]]
"""Tokens to read, and those of them and after them to predict: the last `len(targets)` positions predict the targets."""


class GenscaleLM(TemplateLM):
    """The harness's view of a model. Requests run longest first, `batch_size` side by side.

    Args:
        network: a whole GPT on one device, in evaluation mode.
        tokenizer: the one it was trained with; its end of text stands before a text without context.
        batch_size: sequences in one forward pass.
        autocast: the precision's context for a forward pass.
        seed: of the draws of tasks that ask for sampling.
    """

    def __init__(self, network: GPT, tokenizer: Tokenizer, *, batch_size: int = 8,
                 autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext, seed: int = 0) -> None:
        super().__init__()
        self.network, self.tokens, self.batch_size, self.autocast, self.seed = network, tokenizer, batch_size, autocast, seed
        self.positions = network.settings.positions
        self._device = next(network.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.tokens.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokens.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        # A merge across the border may leave nothing that is the continuation's own.
        return before, after or self.tok_encode(continuation)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would write it) of each request's continuation."""
        results = self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        for (words, _, _), result in zip(requests, results, strict=True):
            if words is not None:
                self.cache_hook.add_partial("loglikelihood", words, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, every token predicted once."""
        results = self._score([([self.prefix_token_id], self.tok_encode(*request.args)) for request in requests], disable_tqdm)
        for request, (total, _) in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return [total for total, _ in results]

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        windows = [(i, window) for i, pair in enumerate(pairs) for window in cut_windows(*pair, self.positions)]
        nats: list[list[float]] = [[] for _ in pairs]
        greedy = [True] * len(pairs)
        for batch in self._batches(windows, lambda item: len(item[1][0]), "log-likelihoods", quiet):
            # Padding stands after the text, so no position of the text sees it.
            longest = max(len(read) for _, (read, _) in batch)
            tokens = torch.tensor([read + [0] * (longest - len(read)) for _, (read, _) in batch], device=self._device)
            with self.autocast():
                logits = self.network(tokens)
            for row, (i, (read, targets)) in zip(logits, batch, strict=True):
                predicted = row[len(read) - len(targets):len(read)].float()
                wanted = torch.tensor(targets, device=self._device)
                nats[i].append(F.cross_entropy(predicted, wanted, reduction="sum").item())
                greedy[i] &= bool((predicted.argmax(-1) == wanted).all())
        return [(-math.fsum(parts), all_likeliest) for parts, all_likeliest in zip(nats, greedy, strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop sequence, the end of text or the task's number of tokens.

        The context keeps its end and leaves room for the new tokens; where they alone fill the positions, the window slides.
        """
        results = [""] * len(requests)
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for group in groups.values():
            settings = _generation(requests[group[0]].args[1])
            for batch in self._batches(group, lambda i: len(contexts[i]), "texts", disable_tqdm):
                for i, text in zip(batch, self._write([contexts[i] for i in batch], batch, **settings), strict=True):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _write(self, contexts: Sequence[list[int]], numbers: Sequence[int], *, new: int, until: Sequence[str],
               **drawing: Unpack[Drawing]) -> list[str]:
        kept = self.positions - new if new < self.positions else self.positions
        tokens, lengths = left_padded([context[-kept:] for context in contexts], self._device)
        texts, words = [GrowingText(self.tokens) for _ in contexts], [""] * len(contexts)
        generators = [torch_generator(self.seed, "harness", i) for i in numbers]
        with self.autocast():
            for drawn in stream(self.network, tokens, new, positions=self.positions, layers=self.network.settings.layers,
                                lengths=lengths, generators=generators, end_of_text=self.tokens.end_of_text,
                                vocab_size=self.tokens.vocab_size, **drawing):
                for i, (text, token) in enumerate(zip(texts, drawn.tolist(), strict=True)):
                    text.add(token)
                    words[i] += text.take()[0]
                    text.ended = text.ended or any(stop in words[i] for stop in until)
                if all(text.ended for text in texts):
                    break
        return [_before(word + text.take(last=True)[0], until) for word, text in zip(words, texts, strict=True)]

    def _batches(self, items: Iterable[Any], length: Callable[[Any], int], what: str, quiet: bool) -> Iterator[list[Any]]:
        """Batches of similar length, the longest first: what does not fit into memory fails at once."""
        ordered = sorted(items, key=length, reverse=True)
        with tqdm(total=len(ordered), desc=what, disable=True if quiet else None, file=sys.stderr) as bar:
            for first in range(0, len(ordered), self.batch_size):
                batch = ordered[first:first + self.batch_size]
                yield batch
                bar.update(len(batch))


def cut_windows(context: list[int], continuation: list[int], positions: int) -> Iterator[Window]:
    """What to read and what to predict, `positions` tokens a time at most: every token of the continuation is predicted once,
    from as many tokens before it as fit."""
    tokens = context + continuation
    for start in range(len(context), len(tokens), positions):
        end = min(start + positions, len(tokens))
        yield tokens[max(0, end - 1 - positions):end - 1], tokens[start:end]


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as arguments of `GenscaleLM._write`. Raises UserError for one that there is none for."""
    from lm_eval.models.utils import normalize_gen_kwargs

    known = normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)
    sampled = known.pop("do_sample", False)
    temperature = known.pop("temperature", 1.0)
    made = {"new": known.pop("max_gen_toks"), "until": [stop for stop in known.pop("until") if stop],
            "temperature": temperature if sampled else 0.0,
            "top_k": known.pop("top_k", None), "top_p": known.pop("top_p", None)}
    if known:
        raise UserError(f"--tasks: generation_kwargs.{next(iter(known))} is not known here; known are until, max_gen_toks, "
                        "do_sample, temperature, top_k and top_p")
    return made


def _before(text: str, stops: Sequence[str]) -> str:
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def evaluate_tasks(model: GenscaleLM, tasks: Sequence[str], include_path: str | None = None,
                   limit: int | None = None) -> dict[str, Any]:
    """The harness's results: `results` by task and metric, versions, numbers of samples, the resolved task configurations.

    Args:
        model: what is evaluated.
        tasks: names of tasks, groups or tags of the harness or of `include_path`.
        include_path: folder of task YAML files of one's own.
        limit: only so many documents of each task.

    Raises:
        UserError: a task that is not known; one of `include_path` that has Python run.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    # The harness reads thousands of files, for some 20 s, to know its own tasks: not where only plain tasks of ours are wanted.
    try:
        if include_path:
            refuse_code(Path(include_path))
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if not set(tasks) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=include_path)
    except (Unreadable, yaml.YAMLError) as error:
        raise UserError(f"--include_path: {include_path} holds a file that is not read: {error}; mend or remove it") from None
    for name in tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            advice = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists its tasks"
            where = f" or of {include_path}" if include_path else ""
            raise UserError(f"--tasks: '{name}' is no task of lm-evaluation-harness{where}; {advice}")
    try:
        # The harness prints here and there; stdout is for the results.
        with contextlib.redirect_stdout(sys.stderr), templates_in_a_sandbox():
            return simple_evaluate(model=model, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False)
    except OSError as error:  # what `datasets` and the hub client raise
        raise UserError(f"--tasks: the data of {', '.join(tasks)} cannot be read ({type(error).__name__}: {str(error)[:200]}); "
                        "fetch it where there is a network, or use a task with local data") from None


def results_table(results: dict[str, Any]) -> str:
    """The results for people, as the harness shows them."""
    from lm_eval.utils import make_table

    return make_table(results) + (make_table(results, "groups") if results.get("groups") else "")
