"""genscale check-family: that every family passes, and that a broken one fails in the row that names what is broken."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.inspection.check_family import FIXED, check_family
from genscale.inspection.family_report import Check
from genscale.inspection.loss_laws import LossFindings, look_at_losses
from genscale.settings.parser import parse_config

ROOT = Path(__file__).resolve().parents[2]
PLANTED = Path(__file__).with_name("planted")
PENALTY = {"model.discriminator_norm": "none", "objective.loss": "wasserstein", "objective.gradient_penalty": 10,
           "objective.discriminator_steps": 2}
CONDITIONAL = {"model.classes": 10, "data.labels": True, "model.spectral_norm": True, "model.discriminator_norm": "none"}


@pytest.fixture
def planted(monkeypatch):
    """The toy and its broken relatives, known here and to every process that is started."""
    monkeypatch.syspath_prepend(PLANTED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLANTED), str(ROOT)]))
    import broken_families

    for name, family in broken_families.FAMILIES.items():
        monkeypatch.setitem(FAMILIES.registered, name, family)
    yield
    sys.modules.pop("broken_families")


def looked_at(name: str) -> LossFindings:
    plain = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in FIXED.items()]
    return look_at_losses(parse_config(FAMILIES, [f"--model.family={name}", *plain]))


def test_losses_that_break_the_law_are_told_apart(planted):
    clean, chance, means = looked_at("toy"), looked_at("chance"), looked_at("means")
    assert (clean.weights, clean.draws, clean.sums) == ([], [], [])
    assert (clean.tensors, clean.values, clean.terms) == (4, 2 * 16 * 16 + 32, {"toy": ["error"]})
    assert "phase toy: error changes with the random state of torch" in chance.draws[0]
    assert means.draws == [] and "phase toy: error is" in means.sums[0] and "not a mean" in means.sums[0]


def test_what_cannot_be_checked_is_said_in_a_line(planted, genscale, tmp_path):
    assert "(did you mean 'vae'?)" in genscale("check-family", "vea").message()
    (tmp_path / "x.yaml").write_text("model: {family: points}")
    assert "is a run of model.family points, not vae" in genscale("check-family", "vae", "--config",
                                                                  tmp_path / "x.yaml").message()
    with pytest.raises(UserError, match="is not empty"):
        check_family("toy", folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "settings"), [
    *(pytest.param(name, {}, marks=() if name == "gpt" else pytest.mark.matrix) for name in FAMILIES),
    pytest.param("dcgan", PENALTY, id="gradient penalty", marks=pytest.mark.matrix),
    pytest.param("dcgan", CONDITIONAL, id="conditional", marks=pytest.mark.matrix),
])  # fmt: skip
def test_every_family_keeps_the_promise(name, settings):
    report = check_family(name, settings=settings)
    assert report.passed, "\n".join(map(str, report.checks))
    refused = {check.name: check.figure for check in report.checks if check.state == "refused"}
    assert set(refused) == ({"zero3", "bf16"} if settings is PENALTY else set())
    assert not refused or "zero3 with a gradient penalty" in refused["zero3"]


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_the_toy_keeps_it(planted):
    report = check_family("toy")
    assert report.passed, "\n".join(map(str, report.checks))
    assert len(report.checks) == 19 and all(check.state == "ok" for check in report.checks)


CENTRED = """
import torch
from torch import nn
import genscale

class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(0), 0.5)
        return self.layer(x)

def loss(network, batch, draws):
    return (network(batch["x"]) - batch["x"]).square().mean(1)

genscale.register(genscale.make_family(
    "centred", network=lambda model: Centred(), loss=loss,
    data=lambda data, seed: genscale.MapData(torch.arange(400.0).sin().view(100, 4), validation=10, seed=seed)))

if __name__ == "__main__":
    genscale.start()
"""


@pytest.mark.slow
def test_a_family_that_a_script_registers_is_checked_by_that_script(genscale_process, tmp_path):
    (tmp_path / "own.py").write_text(CENTRED)
    done = genscale_process("check-family", "centred", command=(sys.executable, str(tmp_path / "own.py")), cwd=tmp_path)
    assert done.code == 1, done.out + done.err
    rows = {line[:27].strip(): line[27:] for line in done.out.splitlines()[1:-1]}
    assert list(rows) == ["loads", "initial weights", "draws", "sums", "trains", "accumulation", "audit"], done.out
    assert [name for name, told in rows.items() if not told.startswith("ok ")] == ["accumulation", "audit"], done.out
    assert "tensor mean (Centred)" in rows["audit"], "and what two processes may not do is tried no further"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "row"), [("means", "sums"), *(
    pytest.param(*broken, marks=pytest.mark.matrix)
    for broken in [("chance", "draws"), ("widening", "bf16")]
)])  # fmt: skip
def test_a_family_that_breaks_it_fails_in_the_row_that_says_why(name, row, planted):
    def show(check: Check) -> None:
        if check.name == row:
            raise Seen(str(check))

    with pytest.raises(Seen, match=f"{row} +failed"):
        check_family(name, show=show)


class Seen(Exception):
    """The row is there; those after it are not waited for."""
