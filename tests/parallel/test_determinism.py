"""run.deterministic: what it sets and puts back, what it refuses, and that a run on the CPU is the same with and without it."""

from __future__ import annotations

import os

import pytest
import torch

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.errors import UserError
from genscale.parallel.determinism import WORKSPACE, deterministic

PUT = (torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
"""Two values for one place: torch has no deterministic form of it, on the CPU either."""


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":4096:8")  # so that what is set meanwhile is undone
    monkeypatch.delenv(WORKSPACE)


def test_an_operation_without_a_deterministic_form_is_named_and_let_through_again_afterwards() -> None:
    wanted = r"^run\.deterministic: true, but put_ has no deterministic form here; set it to false"
    with pytest.raises(UserError, match=wanted), deterministic(True):
        torch.zeros(4).put_(*PUT)
    torch.zeros(4).put_(*PUT)
    with deterministic(False):
        torch.zeros(4).put_(*PUT)


def test_what_is_set_inside_is_as_before_afterwards() -> None:
    def settings() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark,
                torch.utils.deterministic.fill_uninitialized_memory)

    before = settings()
    with deterministic(True):
        assert settings() == (True, True, False, False)
        assert os.environ[WORKSPACE] == ":4096:8"
    assert settings() == before


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="must match the size"), deterministic(True):
        torch.zeros(3) + torch.zeros(4)


def test_a_start_that_cannot_be_deterministic_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match=r"_CONFIG is ':0:0', .* set it to :4096:8 or :16:8"), deterministic(True):
        pass
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # no CUDA here that could have started
    with pytest.raises(UserError, match="CUDA has started without CUBLAS_WORKSPACE_CONFIG; set CUB"), deterministic(True):
        pass


def test_a_run_on_the_cpu_is_the_same_with_and_without(trained, genscale, tiny_config, tiny_run) -> None:
    done = genscale("train", "--config", tiny_config, "--run.deterministic", "true")
    assert done.code == 0, done.err
    last = "checkpoints/step-00000006"
    assert Checkpoint(tiny_run / last).digest() == Checkpoint(trained / last).digest()


def test_a_run_that_meets_such_an_operation_ends_in_one_line(genscale, tiny_config, monkeypatch) -> None:
    from genscale.families.gpt.objective import LanguageModel

    def count(*_: object) -> int:
        return int(torch.zeros(4).put_(*PUT).sum())

    monkeypatch.setattr(LanguageModel, "loss", count)
    said = genscale("train", "--config", tiny_config, "--run.deterministic", "true").message_of_run()
    assert said.startswith("run.deterministic: true, but put_ has no deterministic form here")
