"""`genscale check-family`: whether a family keeps genscale's promise, found out by real runs of a toy of it.

A run must be the same run on one process, with accumulation, under every strategy on two, and on four where shards are
replicated; killed and resumed it must end with the same bits; two processes must be able to go on from where one stopped; and
it must run with weights in bf16.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

from genscale import exit_codes
from genscale.checkpoint.checkpoints import Checkpoint, latest_valid, list_checkpoints
from genscale.errors import UserError
from genscale.families import FAMILIES, family
from genscale.inspection.audit_report import UNEQUAL, listed
from genscale.inspection.comparison import compare_runs
from genscale.inspection.family_report import Check, FamilyReport, row_of, same_run
from genscale.inspection.loss_laws import LossFindings, look_at_losses
from genscale.parallel.processes import on_cpu
from genscale.settings.config import Config, Strategy
from genscale.settings.keys import as_key
from genscale.settings.parser import parse_config
from genscale.testing.processes import GENSCALE, Outcome, group, run, start

STEPS, CHECKPOINT_EVERY, BATCH = 8, 4, 8
ENDLESS = 100_000
"""Steps of the run that is killed; it is not given the time for more than a few."""
FIXED = {
    "train.steps": STEPS, "train.checkpoint_every": CHECKPOINT_EVERY, "train.checkpoint_keep": 1000, "train.log_every": 1,
    "train.evaluate_every": 0, "train.sample_every": 0, "train.global_batch_size": BATCH, "train.micro_batch_size": "null",
    "train.precision": "fp32", "train.clip": 1.0, "train.profile": 0, "train.collapse": "ignore", "guards.dry_batch": True,
    "guards.non_finite": "stop", "optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.lr": 0.01,
    "schedule.name": "constant", "schedule.warmup_steps": 0, "parallel.offload": "none", "parallel.compile": False,
    "parallel.context": 1, "parallel.strategy": "single", "tracking.wandb": "disabled", "tracking.tensorboard": False,
    "run.resume": "auto",
}  # fmt: skip
"""What every run has in common, whatever the config says: with plain gradient descent the same sums in another order stay the
same to the last digits, where AdamW would make much of them."""
SHOWN = 80
"""Characters of what was sampled."""
TIMEOUT = 300
"""Seconds for one run."""
IN_GROUPS = ("groups", 4, "--parallel.strategy=fsdp2", "--parallel.shard_size=2")
"""A run of shards that are replicated: its name, its processes and its settings."""


def check_family(name: str, config: Path | str | None = None, settings: Mapping[str, Any] | None = None, *,
                 folder: Path | None = None, show: Callable[[Check], None] = lambda check: None) -> FamilyReport:
    """Check a family by real runs of 8 steps, in a minute or two.

    Args:
        name: of the family.
        config: YAML file of a run; without one the family's defaults are run, with `Family.tiny`.
        settings: more settings by key, which win.
        folder: keeps the runs, `one`, `ddp`, ...; without one they are deleted.
        show: called with each row as it comes.

    Raises:
        UserError: no such family, or a config that is none.

    Example:
        >>> report = check_family("points")
        >>> report.passed
        True
    """
    began, checks = time.monotonic(), []
    words = _words(name, config, settings or {})
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genscale-family-")))
        if folder is not None and folder.exists() and any(folder.iterdir()):
            raise UserError(f"--folder: {folder} is not empty; give a new one")
        runs = _Runs(name, words, place)
        source = family(name).tiny_from
        if config is None and source is not None:
            runs.train_source(_words(source, None, {}))
        for check in runs.checks():
            checks.append(check)
            show(check)
    return FamilyReport(name, checks, time.monotonic() - began)


def _words(name: str, config: Path | str | None, settings: Mapping[str, Any]) -> list[str]:
    """The flags of the smallest run."""
    entry = family(name)
    own = {**FIXED, **entry.tiny, **settings, "model.family": name} if config is None else {**FIXED, **settings}
    words = ["--config", str(config)] if config is not None else []
    words += [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in own.items()]
    found: Config = parse_config(FAMILIES, words, "genscale check-family")
    if found.model.family != name:
        raise UserError(f"--config: {config} is a run of model.family {found.model.family}, not {name}")
    return words


class _Runs:
    """The runs of one check."""

    def __init__(self, name: str, words: list[str], folder: Path) -> None:
        self.name, self.entry, self.words, self.folder = name, family(name), words, folder
        script = FAMILIES.script if FAMILIES.is_registered(name) else None  # others do not know it
        self.program = (sys.executable, script) if script else GENSCALE

    def train_source(self, words: list[str]) -> None:
        """The run that the others begin from. Raises UserError where it cannot be trained."""
        done = self._run("train", *words, f"--run.dir={self.folder}", "--run.name=source")
        if done.code:
            raise UserError(f"family {self.name}: the run that its tiny run begins from cannot be trained: {done.error}")
        self.words.append(f"--model.from={self.folder / 'source'}")

    def checks(self) -> Iterator[Check]:
        """Row after row; what could not be measured without the one that failed is not asked."""
        config = parse_config(FAMILIES, self.words)
        try:
            self.entry.load()
            losses = look_at_losses(config)
        except UserError as error:
            yield Check("loads", "failed", str(error))
            return
        yield Check("loads", "ok", self._loaded(losses))
        if losses.averaged:
            self.words.append("--train.ema_half_life=50")
        yield from self._losses(losses)
        if losses.weights:
            return
        with ThreadPoolExecutor(2) as pool:  # one process each
            halved = [] if losses.couples_samples else [("accumulation", 1, "--train.micro_batch_size", BATCH // 2)]
            alone, *split = pool.map(lambda asked: self.train(*asked), [("one", 1), *halved])
        if alone.code:
            yield Check("trains", "failed", alone.error)
            return
        yield Check("trains", "ok", f"{STEPS} steps on one process after a dry batch of every phase, {self._loss('one')}")
        if split:
            yield self._same("accumulation", split[0])
        else:
            yield Check("accumulation", "left out", "its losses depend on which samples share a micro-batch (couples_samples)")
        if not (yield from self._audit()):
            return
        yield from self._killed_and_spread()
        if losses.splits_sequences:
            halves = self.train("context", 2, "--parallel.context=2")
            yield self._same("context", halves, "sequences in halves", may_refuse=True)
        yield self._resized()
        yield self._rounded()
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(lambda ask: ask(), [self._sample, self._evaluate])

    def train(self, name: str, processes: int, *own: object) -> Outcome:
        """A run in its folder, to its end."""
        if processes == 1:
            return self._run(*self._words(name), *own)
        command, launched = self._command(processes)
        return run(*self._words(name), *launched, "--parallel.strategy=ddp", *own, timeout=TIMEOUT, command=command)

    def _run(self, *words: object) -> Outcome:
        return run(*words, timeout=TIMEOUT, command=self._command(1)[0])

    def _command(self, processes: int) -> tuple[tuple[str, ...], list[str]]:
        """What starts so many processes, and the words that it needs for it. On a CPU they are forked: to import what they need
        takes longer than their runs do. What is forked cannot use CUDA."""
        if on_cpu():
            return group(processes, *self.program[1:]), []
        return self.program, [] if processes == 1 else ["--processes", str(processes)]

    def _words(self, name: str) -> list[object]:
        return ["train", *self.words, f"--run.dir={self.folder}", f"--run.name={name}"]

    def _loaded(self, losses: LossFindings) -> str:
        kinds = [kind for kind in ("sampling", "scoring") if getattr(self.entry, kind) is not None]
        return f"{losses.objective}; {' and '.join(kinds) or 'neither sampling nor scoring'}"

    def _losses(self, losses: LossFindings) -> Iterator[Check]:
        weights = f"{losses.tensors} tensors, {losses.values:,} values, each drawn by seed and name"
        yield row_of("initial weights", losses.weights, weights)
        if losses.weights:
            return
        terms = "; ".join(f"{phase}: {', '.join(names)}" for phase, names in losses.terms.items())
        yield row_of("draws", losses.draws, f"no random numbers but those of `draws` in {terms}")
        if losses.couples_samples:
            yield Check("sums", "left out", "its losses depend on which samples share a micro-batch (couples_samples)")
        else:
            yield row_of("sums", losses.sums, "each term of a batch is the sum of those of its halves")

    def _audit(self) -> Generator[Check, None, bool]:
        """Whether two processes may train the family at all: what is refused here would be refused in all rows to come."""
        done = self.train("audit", 2, "--audit", 2)
        faults = [line.removeprefix("fault: ") for line in done.out.splitlines() if line.startswith("fault: ")]
        if done.code and not faults:
            yield Check("audit", "failed", done.error)
            return done.code != exit_codes.USER_ERROR
        unequal = [fault for fault in faults if UNEQUAL in fault]
        said = next((line for line in done.out.splitlines() if " in 2 steps; " in line), "")
        yield row_of("audit", [fault for fault in faults if fault not in unequal], said)
        yield row_of("replicas", unequal, "two processes hold equal weights and buffers after 2 steps")
        return True

    def _killed_and_spread(self) -> Iterator[Check]:
        """A run is killed first, so that the one that is not can be made as long as it came to be."""
        strategies = get_args(Strategy)[1:]  # the first is one process alone
        began, killed = self._kill()
        last = killed.step if killed else 0
        longer = ("--train.steps", max(STEPS, last + CHECKPOINT_EVERY))
        resumed = self.train("killed", 2, *longer) if killed else began
        for strategy in strategies:
            own = longer if strategy == strategies[0] else ()
            yield self._same(strategy, self.train(strategy, 2, *own, f"--parallel.strategy={strategy}"),
                             may_refuse=strategy != strategies[0])
        yield self._same(IN_GROUPS[0], self.train(*IN_GROUPS), "fsdp2 in groups, 2 x 2", may_refuse=True)
        yield self._resumed(strategies[0], resumed, last)

    def _kill(self) -> tuple[Outcome, Checkpoint | None]:
        """Start a run, and kill all its processes when it has a checkpoint; what it said, and the checkpoint it will go on
        from."""
        command, launched = self._command(2)
        begun = start(*self._words("killed"), *launched, "--parallel.strategy=ddp", "--train.steps", ENDLESS, command=command)
        checkpoints, deadline = self.folder / "killed" / "checkpoints", time.monotonic() + TIMEOUT
        while begun.process.poll() is None and time.monotonic() < deadline and not list_checkpoints(checkpoints):
            time.sleep(0.01)
        begun.kill()
        return begun.finish(), latest_valid(checkpoints, lambda line: None)

    def _resumed(self, straight: str, done: Outcome, last: int) -> Check:
        title = "kill and resume"
        if done.code != 0 or not last:
            return Check(title, "failed", done.error)
        runs = [self.folder / name for name in (straight, "killed")]
        ends = [latest_valid(path / "checkpoints", lambda line: None) for path in runs]
        if ends[0] is None or ends[1] is None:
            return Check(title, "failed", "the run that was not killed left no checkpoint")
        digests = [end.digest() for end in ends if end is not None]
        comparison = compare_runs(*runs)
        if comparison.first is not None or digests[0] != digests[1]:
            return Check(title, "failed", f"killed after step {last}: {comparison.verdict}")
        return Check(title, "ok", f"SIGKILL, on from step {last} to {ends[0].step}: digest {digests[0][:12]} both times")

    def _resized(self) -> Check:
        shutil.copytree(self.folder / "one", self.folder / "resized")
        for checkpoint in list_checkpoints(self.folder / "resized" / "checkpoints"):
            if checkpoint.step > CHECKPOINT_EVERY:
                shutil.rmtree(checkpoint.path)
        return self._same("resized", self.train("resized", 2), title="resize 1 -> 2 processes")

    def _rounded(self) -> Check:
        """Weights and inputs in bf16, where a network that computes in fp32 in between must say so."""
        done = self.train("bf16", 2, "--parallel.strategy=fsdp2", "--train.precision=bf16")
        if done.code:
            return Check("bf16", "refused" if done.code == 2 else "failed", done.error)
        return Check("bf16", "ok", f"{STEPS} steps under fsdp2 with weights in bf16, {self._loss('bf16')}")

    def _same(self, name: str, done: Outcome, title: str | None = None, may_refuse: bool = False) -> Check:
        """Whether a run is the run of one process but for rounding."""
        title = title or name
        if done.code == 2 and may_refuse:
            return Check(title, "refused", done.error)
        if done.code != 0:
            return Check(title, "failed", done.error)
        return same_run(title, self.folder / "one", self.folder / name)

    def _sample(self) -> Check:
        if self.entry.sampling is None:
            return Check("sample", "left out", "the family makes nothing to write")
        done = self._run("sample", self.folder / "one")
        if done.code != 0:
            return Check("sample", "failed", done.error)
        said = " ".join(done.out.replace(f"{self.folder}/one/", "").split())
        return Check("sample", "ok", said[:SHOWN]) if said else Check("sample", "failed", "nothing was written")

    def _evaluate(self) -> Check:
        own = self.entry.scoring.tiny if self.entry.scoring is not None else {}
        flags = [f"--{as_key(key)}={value}" for key, value in own.items()]
        done = self._run("evaluate", self.folder / "one", *flags)
        if done.code != 0:
            return Check("evaluate", "failed", done.error)
        report = json.loads(done.out)
        numbers = {key: value for key, value in report.items() if isinstance(value, float)}
        return Check("evaluate", "ok", listed([f"{key} {value:.4g}" for key, value in numbers.items()]) or listed(list(report)))

    def _loss(self, name: str) -> str:
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        name = next(key for key in lines[0] if key == "loss" or key.endswith("/loss"))
        return f"{name} {lines[0][name]:.6g} to {next(line[name] for line in reversed(lines) if name in line):.6g}"
