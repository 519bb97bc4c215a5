"""Killed at any moment, as often as you like, a run ends as the run that was never killed. Full size:
python benchmarks/fault_table.py --only kills --kills 100, and for rewards: --families reward,reward-http --strategies
ddp,zero2,zero3,fsdp2 --kills 80."""

from __future__ import annotations

import pytest

IN_CI = {("gpt", "ddp"): 10, ("dcgan", "fsdp2"): 2, ("vae", "zero2"): 2}
"""Kills of each family in CI; the whole table takes many times as long. tests/distributed/test_reward_runs.py kills a run of
rewards under ZeRO-3 once, and tests/rewards/test_judged_runs.py one that a server judges."""
THREE, FOUR = ("ddp", "zero2", "fsdp2"), ("ddp", "zero2", "zero3", "fsdp2")
CELLS = [pytest.param(family, strategy, IN_CI.get((family, strategy), 10),
                      marks=() if (family, strategy) in IN_CI else pytest.mark.matrix)
         for family, strategies in (("gpt", THREE), ("dcgan", THREE), ("vae", THREE), ("reward", FOUR), ("reward-http", FOUR))
         for strategy in strategies]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("family", "strategy", "kills"), CELLS)
def test_kills_change_nothing(family, strategy, kills, campaign, tmp_path):
    """Of one rank, all ranks, the launcher, everything; at starts, in steps, in saves. Final digest and every logged number
    equal those of the undisturbed run, all checkpoints are whole at each start, no process and no file stays behind."""
    deaths = campaign.survive(family, strategy, kills, seed=1, folder=tmp_path / "campaign")
    assert len(deaths) == kills
    assert kills < 10 or any(death.in_save for death in deaths)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("family", "strategy"), [("vae", "ddp"), pytest.param("gpt", "zero2", marks=pytest.mark.matrix),
                                                  pytest.param("dcgan", "fsdp2", marks=pytest.mark.matrix)])
def test_another_number_of_processes_after_each_kill(family, strategy, campaign, tmp_path):
    """1, 2, 3 and 4 at random: each sample exactly once an epoch, losses those of one process."""
    deaths = campaign.survive_resizes(family, strategy, kills=2, seed=2, folder=tmp_path / "campaign")
    assert len({death.shape.processes for death in deaths}) == 2
