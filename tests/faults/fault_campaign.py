"""A run killed again and again at moments that a seed picks, and held against the run that nobody disturbed."""

from __future__ import annotations

import math
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from fault_runs import SETTINGS, Life, Run, Shape, make_source, training_lines, wait_for
from random_judge import judging_at_random

from genscale.data.loader import StepLoader
from genscale.families import FAMILIES, family
from genscale.settings.parser import parse_config

MOMENTS = ("saving", "step", "start", "saving", "step")
"""When to strike: as a checkpoint is written, in a step, while libraries are loaded and the run is taken up again."""
START_SECONDS = 10.0
"""What a start takes, about, where no run has told it yet."""
VICTIMS = ("one rank", "all ranks", "the launcher", "everything")


@dataclass(frozen=True)
class Kill:
    """A SIGKILL to come.

    Attributes:
        step: not before this step.
        share: of the seconds of a start, a step or a save at which it strikes.
        rank: which one dies, of `one rank` (modulo the processes).
    """

    moment: str
    victim: str
    step: int
    share: float
    rank: int


@dataclass
class Death:
    """A kill that was done, and what came of it.

    Attributes:
        in_save: an unfinished checkpoint was left behind: it struck while one was written.
        seconds_to_end: from the kill until none of the processes was left.
        seconds_to_recover: from the kill to the next step that was trained (waiting for the end and starting again included);
            None where the next life was killed before that.
    """

    kill: Kill
    shape: Shape
    step: int
    in_save: bool
    seconds_to_end: float
    seconds_to_recover: float | None = None


def plan_kills(seed: int, count: int, steps: int) -> list[Kill]:
    """`count` kills in the order of their steps, every moment and victim in turn, so that few kills see all of them."""
    draw = random.Random(seed)
    moments, victims = [MOMENTS[i % len(MOMENTS)] for i in range(count)], [VICTIMS[i % len(VICTIMS)] for i in range(count)]
    draw.shuffle(moments)
    draw.shuffle(victims)
    at = sorted(draw.randint(2, steps * 3 // 4) for _ in range(count))  # well before the end, which a run may reach by itself
    return [Kill(moment, victim, step, draw.random(), draw.randrange(64))
            for moment, victim, step in zip(moments, victims, at, strict=True)]


class Campaign:
    """One run and its kills; `complete` takes it to its end.

    Args:
        shapes: of the lives in turn; the last one stays.
        start_seconds: what a start takes, about.
    """

    def __init__(self, run: Run, kills: Sequence[Kill], shapes: Sequence[Shape], start_seconds: float) -> None:
        self.run, self.kills, self.shapes, self.start_seconds = run, list(kills), list(shapes), start_seconds
        self.deaths: list[Death] = []
        self._killed = 0.0
        self._unfinished: set[tuple[str, int]] = set()

    def complete(self) -> list[Death]:
        """Kill and start again until the run ends. Raises AssertionError at the first thing that is not as it must be."""
        for number, kill in enumerate(self.kills):
            self._live(kill, self.shapes[min(number, len(self.shapes) - 1)])
        self._live(None, self.shapes[min(len(self.kills), len(self.shapes) - 1)])
        return self.deaths

    def _live(self, kill: Kill | None, shape: Shape) -> None:
        latest = self.run.latest()
        done, before = (latest.step if latest else 0), self.run.metrics_version()
        self._unfinished = self.run.unfinished()

        def trained() -> bool:  # the file is written anew as the run is taken up again
            return self.run.metrics_version() != before and self.run.step() > done

        life = self.run.start(shape)
        try:
            strike_at = life.started + kill.share * self.start_seconds if kill and kill.moment == "start" else math.inf
            wait_for(lambda: trained() or time.monotonic() > strike_at, life, 0.005)
            assert life.process.poll() in (None, 0), life.output()[-5000:]
            if trained():
                self.start_seconds = time.monotonic() - life.started
                if self.deaths:
                    self.deaths[-1].seconds_to_recover = time.monotonic() - self._killed
            if kill is None:
                life.wait_until_gone()
                assert life.process.returncode == 0, life.output()[-5000:]
            else:
                self._strike(kill, shape, life)
        finally:
            life.kill()

    def _strike(self, kill: Kill, shape: Shape, life: Life) -> None:
        condemned = victims(kill, life)  # looked up ahead: a save does not wait for it
        if kill.moment != "start":
            wait_for(lambda: self.run.step() >= kill.step, life, 0.002)
            if kill.moment == "saving":
                # A busy machine lets none be seen for a while: then the kill is one in a step.
                wait_for(lambda: self._saving() or self.run.step() > kill.step + 3, life, 0.0005)
            time.sleep(kill.share * 0.05)
        assert not life.ended(), f"ended with {life.process.returncode} by itself before {kill}\n{life.output()[-5000:]}"
        step, self._killed = self.run.step(), time.monotonic()
        for process in condemned:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        struck = self._saving()
        self.deaths.append(Death(kill, shape, step, struck, life.wait_until_gone()))

    def _saving(self) -> bool:
        return any("-step-" in name for name, _ in self.run.unfinished() - self._unfinished)


def victims(kill: Kill, life: Life) -> list[psutil.Process]:
    """Whom to kill. Before there are ranks, everything."""
    ranks, family = life.ranks(), life.family()
    if kill.victim == "the launcher":
        return [process for process in family if process.pid == life.process.pid]
    if kill.victim == "everything" or not ranks:
        return family
    return [ranks[kill.rank % len(ranks)]] if kill.victim == "one rank" else ranks


def check_same(run: Run, truth: Run) -> None:
    """Bit for bit the run that nobody disturbed, and nothing left behind."""
    expected = truth.metrics()
    steps = [line["step"] for line in training_lines(expected)]
    assert steps == list(range(1, run.settings["train.steps"] + 1))
    found = run.metrics()
    different = next(((line, true) for line, true in zip(found, expected, strict=False) if line != true), None)
    assert different is None, f"{different[0]} of the disturbed run is {different[1]} of the undisturbed one"
    assert len(found) == len(expected)
    latest = run.latest()
    assert latest is not None and latest.step == steps[-1]
    assert latest.digest() == truth.latest().digest()
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == [p.name for p in sorted(truth.checkpoints.iterdir())]
    assert run.leftovers() == []


def survive(family: str, strategy: str, kills: int, seed: int, folder: Path) -> list[Death]:
    """A campaign on two processes, from nothing to the verdict."""
    steps = 60 + 4 * kills  # so that no run ends before a busy machine comes to kill it
    settings = {**SETTINGS[family], "data.source": make_source(family, folder / "source"), "train.steps": steps}
    with judging_at_random(folder) if family == "reward-http" else nullcontext() as judge:
        settings |= judge.settings if judge else {}
        shape = Shape(strategy, 2)
        truth, run = Run(folder / "undisturbed", settings), Run(folder / "killed", settings)
        start_seconds = START_SECONDS if judge else truth.run_to_end(shape)
        deaths = Campaign(run, plan_kills(seed, kills, steps), [shape], start_seconds).complete()
        if judge:  # who would say something else now: the undisturbed run takes what was said
            take_rewards(truth, run)
            asked = judge.asked
            truth.run_to_end(shape, launcher=False)
            assert judge.asked == asked, f"{judge.asked - asked} answers had not been written down"
    check_same(run, truth)
    return deaths


def take_rewards(run: Run, other: Run) -> None:
    """Give a run that has not begun what judges have said to another."""
    run.folder.mkdir(parents=True)
    for path in sorted(other.folder.glob("rewards-*.jsonl")):
        shutil.copy(path, run.folder)


# --- the number of processes changes between kills -----------------------------------------------------------------------

SIZES = (1, 2, 3, 4)
# Equal to 1e-5 whatever the shape: AdamW would magnify rounding once its warm-up is over (law 1).
PLAIN = {"optimizer.name": "sgd", "schedule.name": "constant", "train.evaluate_every": 0}
RATES = {"gpt": 0.1, "dcgan": 0.02, "vae": 1e-4}


def plan_sizes(seed: int, count: int) -> list[int]:
    """`count` numbers of processes at random, each other than the one before; the first four are all of them."""
    draw = random.Random(seed)
    sizes = draw.sample(SIZES, len(SIZES))
    while len(sizes) < count:
        sizes.append(draw.choice([size for size in SIZES if size != sizes[-1]]))
    return sizes[:count]


def survive_resizes(family: str, strategy: str, kills: int, seed: int, folder: Path) -> list[Death]:
    """Each life on another number of processes, against one process that nobody disturbed."""
    steps = 24 + 2 * kills
    settings = {**SETTINGS[family], **PLAIN, "optimizer.lr": RATES[family], "train.steps": steps,
                "data.source": make_source(family, folder / "source")}
    settings.pop("train.micro_batch_size", None)  # what divides for one number of processes does not for another
    truth, run = Run(folder / "undisturbed", settings), Run(folder / "resized", settings)
    start_seconds = truth.run_to_end(Shape("single", 1))
    shapes = [Shape(strategy, size) for size in plan_sizes(seed, kills + 1)]
    deaths = Campaign(run, plan_kills(seed, kills, steps), shapes, start_seconds).complete()
    check_alike(run, truth)
    check_each_sample_once(run)
    return deaths


def check_alike(run: Run, truth: Run) -> None:
    """Every step once, on the same samples, losses within 1e-5 (of the largest: a generator's passes through small values)."""
    found, expected = (list(training_lines(each.metrics())) for each in (run, truth))
    assert [line["step"] for line in found] == list(range(1, run.settings["train.steps"] + 1))
    assert [line["data_digest"] for line in found] == [line["data_digest"] for line in expected]
    names = [name for name in expected[0] if name == "loss" or name.endswith("/loss")]
    assert names
    for name in names:
        largest = max(abs(line[name]) for line in expected)
        off = max(abs(line[name] - true[name]) for line, true in zip(found, expected, strict=True)) / largest
        assert off <= 1e-5, f"{name} is off by {off:.1e}"


def check_each_sample_once(run: Run) -> None:
    """The samples of every step, read again by one process, are those of the run's ledger; of images, whose contents all
    differ, every whole epoch has each exactly once."""
    config = parse_config(FAMILIES, run.words())
    data = family(config.model.family).build_data(config.data, config.run.seed)
    size = config.train.global_batch_size
    loader = StepLoader(data, global_batch_size=size, micro_batch_size=size, rank=0, world_size=1, workers=0, prefetch_steps=2)
    contents: list[bytes] = []
    try:
        for line in training_lines(run.metrics()):
            (batch,) = loader.next_batch()
            assert batch["sample"].tolist() == list(range((line["step"] - 1) * size, line["step"] * size))
            assert loader.digest() == line["data_digest"]
            contents += [image.numpy().tobytes() for image in batch.get("image", ())]
    finally:
        loader.close()
        data.close()
    images = set(contents)
    for epoch in range(len(contents) // max(len(images), 1)):
        assert set(contents[epoch * len(images) : (epoch + 1) * len(images)]) == images
