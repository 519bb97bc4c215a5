"""Arrays of runs: grids, values from a file, limits; and what bash makes of each element."""

from __future__ import annotations

import itertools
import json
import subprocess

import pytest

from genscale.cluster.array import read_array
from genscale.cluster.slurm_commands import options_in
from genscale.errors import UserError


def test_several_settings_make_a_grid():
    array = read_array(["seed=0-1", "optimizer.lr=1e-3,3e-4,1e-4%4"])
    assert array.elements() == list(itertools.product(("0", "1"), ("1e-3", "3e-4", "1e-4")))
    assert (array.for_sbatch(), array.name_of("tiny", array.elements()[4])) == ("0-5%4", "tiny-seed1-lr3e-4")
    assert array.settings_of(array.elements()[4]) == {"run.seed": "1", "optimizer.lr": "3e-4"}
    assert read_array(["seed=0-9%4", "train.steps=1,2%3"]).at_once == 3


def test_a_list_from_a_file(tmp_path):
    (tmp_path / "lrs.txt").write_text("# tried before\n1e-3\n\n[0.9, 0.95]\n")
    array = read_array([f"optimizer.lr=@{tmp_path}/lrs.txt%1"])
    assert (array.axes[0].values, array.for_sbatch()) == (("1e-3", "[0.9, 0.95]"), "0-1%1")


@pytest.mark.parametrize(("texts", "message"), [
    (["seed=0-1", "run.seed=2"], "run.seed is named twice; write all of its values in one list"),
    (["seed=0-999", "train.steps=1,2,3,4,5,6,7,8,9,10,11"], "1000 x 11 are 11,000 runs; nearest allowed: 10,000"),
    (["seed=@{tmp}/none"], r"cannot read '.*/none' \(No such file or directory\)"),
    (["seed=@{tmp}"], r"cannot read '.*' \(Is a directory\)"),
    (["seed=@{tmp}/empty"], "'.*/empty' has no values; write one on each line"),
    (["data.source=a\tb"], r"'a\\tb' is not a value that a job's script can hold"),
])  # fmt: skip
def test_what_is_no_array(texts, message, tmp_path):
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(UserError, match=f"^--array: {message}"):
        read_array([text.replace("{tmp}", str(tmp_path)) for text in texts])


@pytest.mark.parametrize("texts", [
    ["seed=3-5"], ["optimizer.lr=1e-3,3e-4"], ["seed=0-1", "optimizer.lr=1e-3,3e-4,1", "data.source=it's,a b/$c"],
])  # fmt: skip
def test_bash_finds_the_run_and_the_settings_of_each_element(texts):
    array = read_array(texts)
    script = "\n".join(array.script("runs/my demo", ["--train.steps", "9"]))
    script += '\nprintf "%s\\n" "$run" "${settings[@]}"'
    for index, element in zip(array.indices(), array.elements(), strict=True):
        said = subprocess.run(["bash", "-c", script], env={"SLURM_ARRAY_TASK_ID": str(index)}, capture_output=True, text=True)
        own = [f"--{key}={value}" for key, value in array.settings_of(element).items()]
        assert said.stdout.splitlines() == [array.name_of("runs/my demo", element), "--train.steps", "9", *own], said.stderr


def test_a_grid_is_submitted_and_each_run_knows_its_values(genscale, tool, tiny_config, tiny_run, tmp_path):
    tool("sbatch", f'echo "$*" >> {tmp_path}/given; echo 12')
    tool("squeue", "exit 0")
    tool("sinfo", "exit 1")
    site = tmp_path / "site.yaml"
    tool("python", "exit 0")
    site.write_text("setup: []\ngpus_per_node: 0\ncpus_per_process: 1\n")
    words = ("slurm", "submit", "--config", tiny_config, "--site", site, "--launcher", "srun")
    done = genscale(*words, "--array", "seed=0-1", "--array=train.log_every=1,2%2")
    assert done.out.startswith(f"submitted job 12: 4 runs {tiny_run}-seed*"), done.err
    assert "--array=0-3%2" in (tmp_path / "given").read_text().split()
    noted = json.loads((tiny_run.parent / "tiny-seed1-log_every2" / "jobs" / "jobs.json").read_text())["jobs"][-1]
    assert (noted["job"], noted["settings"]) == ("12_3", {"run.seed": "1", "train.log_every": "2"})
    assert "--array=0-3%2" in options_in((tiny_run / "jobs" / "0001" / "job.sbatch").read_text())
    said = genscale(*words, "--array", "seed=5-6", "--array=train.global_batch_size=4,3", "--tasks-per-node", 2).message()
    assert said.startswith("--array: run.seed=5 train.global_batch_size=3: train.global_batch_size: 3 does not divide by 2")
