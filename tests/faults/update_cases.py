"""Faults 6 and 7: updates that would do harm, and batches that do not fit in memory."""

from __future__ import annotations

import json
import random
import time

from fault_bench import STEPS, Bench, Case, end, living, one_error, planted, wait_for_step
from fault_runs import Run, training_lines

from genscale.data.loader import StepLoader
from genscale.objectives import FAMILIES
from genscale.settings.parser import parse_config
from genscale.tracking.metrics_file import read_metrics

SPIKE_STEPS = 44
"""A spike is told from the losses of 32 steps at least."""
LARGE = {
    "gpt": {"model.layers": 6, "model.width": 512, "model.positions": 256, "data.sequence_length": 256},
    "dcgan": {"model.width": 64, "data.size": 256}, "vae": {"model.width": 64, "data.size": 128},
}  # fmt: skip
"""What takes some GiB a step, of which 400 MiB are allowed (planted/sitecustomize.py)."""


def struck_at(step: int, run: Run, bench: Bench, what: str, rank: int) -> tuple[float, str]:
    """Train to the end with that planted on a rank: the seconds from the step before to the one after, and what was printed."""
    with living(run, bench.shape, **planted(what, rank, step)) as life:
        wait_for_step(run, life, step - 1)
        before = time.monotonic()
        wait_for_step(run, life, step + 1)
        return time.monotonic() - before, end(life, 0)


def not_a_number(bench: Bench, draw: random.Random) -> float:
    """Fault 6: NaN in the gradient of one rank; all ranks leave the update out, say so once, and go on."""
    run, rank, step = bench.run(), draw.randrange(2), draw.randint(2, STEPS - 8)
    seconds, _ = struck_at(step, run, bench, "nan", rank)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    skipped = {line["step"]: line.get("skipped_steps", 0) for line in lines if "data_digest" in line}
    assert skipped == {n: int(n >= step) for n in range(1, STEPS + 1)}, skipped
    before = [list(training_lines(each.metrics()))[: step - 1] for each in (run, bench.truth)]
    assert before[0] == before[1]
    return seconds


def rolled_back(bench: Bench, draw: random.Random) -> float:
    """Fault 6 with the policy rollback: the run goes back to its latest checkpoint and on without the offending batch."""
    run, rank = bench.run(**{"guards.non_finite": "rollback"}), draw.randrange(2)
    step = draw.randint(5, STEPS - 8)
    seconds, output = struck_at(step, run, bench, "nan", rank)
    assert "Traceback" not in output, output[-5000:]
    lines = list(training_lines([json.loads(line) for line in run.metrics_file.read_text().splitlines()]))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["rollbacks"] == 1
    check_left_out(run, step - 1)
    return seconds


def check_left_out(run: Run, batch: int) -> None:
    """The ledger of the run is that of data which never had this global batch."""
    config = parse_config(FAMILIES, run.words())
    data = FAMILIES[config.model.family].build_data(config.data, config.run.seed)
    size = config.train.global_batch_size
    loader = StepLoader(data, global_batch_size=size, micro_batch_size=size, rank=0, world_size=1, workers=0, prefetch_steps=2,
                        left_out={batch})
    try:
        for line in training_lines(run.metrics()):
            loader.next_batch()
            assert loader.digest() == line["data_digest"], line["step"]
    finally:
        loader.close()
        data.close()


def spike_skipped(bench: Bench, draw: random.Random) -> float:
    """Fault 6: the loss of one rank is a million times what it was; with the policy skip the update is left out on both, said
    once, and training goes on. Where the trace has the weights of a step, they are those of the step before."""
    settings = {"train.steps": SPIKE_STEPS, "guards.spikes": "skip", "run.trace": "true"}
    run, rank, step = bench.run(**settings), draw.randrange(2), draw.randint(35, SPIKE_STEPS - 4)
    seconds, output = struck_at(step, run, bench, "spike", rank)
    assert output.count("standard deviations above the mean") == output.count("is left out") == 1, output[-5000:]
    skipped = {line["step"]: line.get("skipped_steps", 0) for line in training_lines(run.metrics())}
    assert skipped == {n: int(n >= step) for n in range(1, SPIKE_STEPS + 1)}, skipped
    weights = {line["step"]: next(iter(line["weights"].values())) for line in read_metrics(run.folder / "trace.jsonl")}
    same = [n for n in range(1, SPIKE_STEPS + 1) if weights[n] == weights[n - 1]]  # of the network that is trained first
    assert same == [step], same
    return seconds


def spike_rolled_back(bench: Bench, draw: random.Random) -> float:
    """Fault 6: the same with the policy rollback: back to the latest checkpoint, and on without the offending batch."""
    settings = {"train.steps": SPIKE_STEPS, "guards.spikes": "rollback"}
    run, rank, step = bench.run(**settings), draw.randrange(2), draw.randint(35, SPIKE_STEPS - 4)
    seconds, output = struck_at(step, run, bench, "spike", rank)
    assert "Traceback" not in output and output.count("standard deviations above the mean") == 1, output[-5000:]
    lines = list(training_lines(run.metrics()))
    assert [line["step"] for line in lines] == list(range(1, SPIKE_STEPS + 1))
    assert lines[-1]["rollbacks"] == 1
    check_left_out(run, step - 1)
    return seconds


def out_of_memory(bench: Bench, draw: random.Random) -> float:
    """Fault 7: the first batch does not fit into one rank's host memory; a dry batch finds it before the first step, and one
    line names the settings that decide, and what to try. The seconds are those to the message."""
    rank, size = draw.randrange(2), 24
    settings = {"train.global_batch_size": size, "train.micro_batch_size": size // 2, **LARGE[bench.family]}
    run = bench.run(**settings)
    with living(run, bench.shape, **planted("memory", rank, 1)) as life:
        message = one_error(end(life, 2))
        seconds = time.monotonic() - life.started
    sizes = [f"{key} is {value}" for key, value in settings.items() if key in ("data.sequence_length", "data.size")]
    words = [f"out of memory on the host, rank {rank}, at the dry batch", f"train.micro_batch_size is {size // 2}", *sizes,
             "parallel.activation_checkpointing is none", f"parallel.strategy is {bench.shape.strategy}",
             f"try train.micro_batch_size {size // 4}", "then parallel.activation_checkpointing full"]
    assert all(word in message for word in words), message
    assert list(training_lines(run.metrics())) == [] and run.saved() == 0
    return seconds


CASES: dict[str, Case] = {
    "6 NaN on one rank, skipped": not_a_number, "6 NaN on one rank, rolled back": rolled_back,
    "6 loss spike, skipped": spike_skipped, "6 loss spike, rolled back": spike_rolled_back,
    "7 out of memory on the host": out_of_memory,
}  # fmt: skip
