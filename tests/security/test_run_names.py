"""A run's name cannot lead out of run.dir."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

NAMES = ["..", ".", "../out", "a/b", "/tmp/out", "a/../../out", "", "a\nb", "a\tb", "~/out", "\x1b[2J"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_plain_folder_name_is_refused(name, genscale, tiny_config, tmp_path) -> None:
    settings = yaml.safe_load(tiny_config.read_text())
    settings["run"]["name"] = name
    tiny_config.write_text(yaml.safe_dump(settings))
    before = sorted(tmp_path.rglob("*"))
    assert "run.name: " in genscale("train", "--config", tiny_config).message()
    assert genscale("train", "--config", tiny_config, f"--run.name={name}").message().startswith("run.name: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_a_name_that_no_file_system_takes_is_one_line(name, genscale, tiny_config) -> None:
    assert genscale("train", "--config", tiny_config, f"--run.name={name}").message_of_run().startswith("run.")


def test_a_run_folder_may_be_a_link_that_its_owner_made(genscale, tiny_config, tmp_path) -> None:
    """To a larger disk, say: run.dir is his; only names must not lead out of it."""
    elsewhere, runs = tmp_path / "elsewhere", tmp_path / "runs"
    elsewhere.mkdir()
    runs.mkdir()
    Path(runs / "tiny").symlink_to(elsewhere)
    assert genscale("train", "--config", tiny_config, "--train.steps", 1).code == 0
    assert (elsewhere / "metrics.jsonl").exists() and (runs / "tiny").is_symlink()
