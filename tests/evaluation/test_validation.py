"""Validation by several ranks, simulated in turn, against one forward pass over everything."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genscale.evaluation.validation import validate
from genscale.families import family
from genscale.parallel.materialise import fill, materialise
from genscale.settings.config import Config
from genscale.testing.objectives import BareObjective

CPU = torch.device("cpu")


class MeanSquare(BareObjective):
    """Fits nothing: adds up squared errors of a network, and remembers what it was shown."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__({"net": nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))})
        self.seen = []

    def evaluate(self, networks, batch) -> dict[str, Tensor]:
        self.seen.append((batch["x"].clone(), networks["net"].training, torch.is_grad_enabled()))
        error = networks["net"](batch["x"]) - batch["y"]
        return {"square": error.square().sum(), "count": torch.tensor(float(len(error))),
                "errors": torch.cat([error, error.double() * 0 + batch["sample"][:, None]], dim=1)}

    def summarise(self, totals) -> dict[str, float]:
        self.totals = totals
        return {"loss": totals["square"] / totals["count"], "count": totals["count"]}


def samples(n: int) -> list[dict[str, np.ndarray]]:
    """n samples of very different sizes, so that the order of their sum shows in its last digits."""
    draw = np.random.default_rng(1)
    return [{"x": (draw.normal(size=3) * 10 ** draw.uniform(-3, 3)).astype(np.float32),
             "y": draw.normal(size=1).astype(np.float32)} for _ in range(n)]


def by_ranks(world_size: int, n: int, autocast=nullcontext) -> tuple[list[dict[str, float]], list[MeanSquare]]:
    """Each rank's answer and objective. The ranks run one after the other: first for their tables, then with the true sum."""
    def run(objective: MeanSquare, rank: int, reduce_sum) -> dict[str, float]:
        return validate(objective, objective.networks, samples(n), batch_size=4, rank=rank, world_size=world_size,
                        device=CPU, reduce_sum=reduce_sum, autocast=autocast)

    tables: list[list[Tensor]] = [[] for _ in range(world_size)]
    for rank in range(world_size):
        run(MeanSquare(), rank, lambda table, rank=rank: tables[rank].append(table.clone()) or table.clamp(min=1))
    sums = [sum(parts) for parts in zip(*tables, strict=True)]
    assert [table.dtype for table in sums] == [torch.float64, torch.float32], "two reductions a rank: of sums, and of values"
    objectives = [MeanSquare() for _ in range(world_size)]
    answers = []
    for rank, objective in enumerate(objectives):
        turns = iter(sums)
        answers.append(run(objective, rank, lambda table, turns=turns: next(turns)))
    return answers, objectives


@pytest.mark.parametrize("n", [1, 11, 24])
def test_result_is_the_same_for_any_number_of_ranks(n: int) -> None:
    rows = samples(n)
    x, y = (torch.from_numpy(np.stack([row[key] for row in rows])).double() for key in "xy")
    linear = MeanSquare().networks["net"][0].double()
    expected = (linear(x) - y).square().mean().item()
    (single,), _ = by_ranks(1, n)
    assert single["count"] == n and single["loss"] == pytest.approx(expected, rel=1e-5)
    for world_size in (2, 3, 5, 8):
        answers, _ = by_ranks(world_size, n)
        assert all(answer == single for answer in answers)  # to the last digit


@pytest.mark.parametrize("n", [1, 11, 24])
def test_values_by_sample_are_joined_in_the_order_of_the_samples(n: int) -> None:
    """To the last digit for any number of ranks; each sample is told its number in the set."""
    rows = samples(n)
    x, y = (torch.from_numpy(np.stack([row[key] for row in rows])) for key in "xy")
    expected = MeanSquare().networks["net"][0](x).detach() - y
    for world_size in (1, 2, 3, 8):
        _, objectives = by_ranks(world_size, n)
        for objective in objectives:
            found = objective.totals["errors"]
            assert found.dtype == torch.float32 and found.shape == (n, 2)
            torch.testing.assert_close(found[:, :1], expected, rtol=1e-5, atol=1e-5)
            assert found[:, 1].tolist() == list(range(n))
            if world_size == 1:
                alone = found
            assert torch.equal(found, alone)


@pytest.mark.parametrize(("world_size", "n", "forwards"), [(1, 11, 3), (2, 11, 2), (3, 11, 1), (4, 11, 1), (2, 24, 3)])
def test_every_rank_runs_the_same_number_of_forwards(world_size: int, n: int, forwards: int) -> None:
    _, objectives = by_ranks(world_size, n)
    assert [len(objective.seen) for objective in objectives] == [forwards] * world_size


def test_networks_are_evaluated_without_dropout_or_gradient_and_return_to_their_mode() -> None:
    objective = MeanSquare()
    frozen = nn.Linear(2, 2).eval()
    networks = {"net": objective.networks["net"].train(), "frozen": frozen}
    validate(objective, networks, samples(5), batch_size=2, rank=0, world_size=1, device=CPU, reduce_sum=lambda t: t,
             autocast=nullcontext)
    assert [(training, gradient) for _, training, gradient in objective.seen] == [(False, False)] * 3
    assert networks["net"].training and networks["net"][1].training and not frozen.training


def test_every_sample_is_reported_once_as_progress() -> None:
    told: list[int] = []
    for rank in range(3):
        objective = MeanSquare()
        validate(objective, objective.networks, samples(11), batch_size=2, rank=rank, world_size=3, device=CPU,
                 reduce_sum=lambda table: table.clamp(min=1), autocast=nullcontext, on_batch=told.append)
    assert sorted(told) == [1, 2, 2, 2, 2, 2]


def test_forwards_run_in_the_given_precision() -> None:
    (full,), _ = by_ranks(1, 11)
    (half,), _ = by_ranks(1, 11, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert half["loss"] != full["loss"] and half["loss"] == pytest.approx(full["loss"], rel=0.05)


def test_a_gpt_that_knows_nothing_needs_a_uniform_code_for_held_out_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} says that {i} squared is {i * i}." for i in range(200)))
    gpt = family("gpt")
    settings = gpt.data_settings(source=str(tmp_path / "text.txt"), sequence_length=32, validation_fraction=0.1)
    config = Config(data=settings, model=gpt.model_settings(layers=1, heads=1, width=8, positions=32, init_std=1e-4))
    data = gpt.build_data(settings, config.run.seed)
    objective, blocks = gpt.build_objective(config, data), data.validation()
    materialise(objective.networks["gpt"], CPU)
    fill(objective.networks["gpt"], objective.initial_weights("gpt"))
    metrics = validate(objective, objective.networks, blocks, batch_size=3, rank=0, world_size=1, device=CPU,
                       reduce_sum=lambda table: table, autocast=nullcontext)
    targets = np.concatenate([block["tokens"][1:] for block in blocks])
    tokens, letters = (targets >= 0).sum(), ((targets >= 0) & (targets < 256)).sum()
    assert tokens > letters > 200  # ends of text are tokens but no bytes
    assert metrics["loss"] == pytest.approx(math.log(320), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(320) * tokens / letters, rel=1e-4)
