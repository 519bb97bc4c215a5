"""What is found wrong before a job is submitted, and what is said of Slurm's own refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from genscale.cluster.gpus import gpus_in
from genscale.cluster.job import JobSettings, settle
from genscale.cluster.job_records import Submitted, jobs_of, new_folder, record, runs_of, submitted
from genscale.cluster.partition import Node, Partition, check_fits, find_partition
from genscale.cluster.site import Site
from genscale.cluster.slurm_commands import explain
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.inspection.config_check import check_config
from genscale.settings.parser import load_config
from genscale.supervise.run_owner import RunOwner, who_has


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without Slurm, whatever this one has."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.mark.parametrize("action", ["submit", "resubmit", "status", "hold", "cancel", "logs"])
def test_without_slurm_it_says_so_and_that_render_works(action, genscale, tiny_config, copied, nowhere):
    (copied / "jobs").mkdir()
    words = ["--config", tiny_config] if action == "submit" else [copied]
    message = genscale("slurm", action, *words).message()
    assert "not found on this machine" in message and "genscale slurm render" in message
    assert genscale("slurm", "render", "--config", tiny_config).out.startswith("#!/bin/bash\n")


@pytest.fixture
def check(tiny_config):
    """`check_config` with other settings, for four processes."""

    def run(*settings):
        check_config(load_config(FAMILIES, tiny_config, [str(word) for word in settings]), 4)

    return run


@pytest.mark.parametrize(("settings", "message"), [
    (("--train.global_batch_size", 6), "^train.global_batch_size: 6 does not divide by 4 processes"),
    (("--train.micro_batch_size", 3), "^train.micro_batch_size: 3 x 4 processes does not divide"),
    (("--parallel.strategy", "single"), "^parallel.strategy: single means one process"),
    (("--parallel.offload", "cpu"), "^parallel.offload: cpu needs ZeRO"),
    (("--train.precision", "fp16", "--parallel.strategy", "zero2"), "^train.precision: fp16 under parallel.strategy zero2"),
    (("--train.collapse", "stop"), "^train.collapse: stop goes by the evaluations"),
    (("--data.source", "no-such-file.txt"), "^data.source=no-such-file.txt: there is no such file"),
    (("--data.sequence_length", 64), "positions"),
    (("--optimizer.lr_of", "{generator: 1e-3}"), "^optimizer.lr_of: generator is no network"),
    (("--run.resume", "nowhere/step-00000002"), "^run.resume: 'nowhere/step-00000002' is not a checkpoint folder"),
    (("--run.name", "a/b"), "^run.name: 'a/b' must be a plain folder name"),
])  # fmt: skip
def test_a_config_is_checked_for_the_processes_it_will_have(settings, message, check, tiny_run):
    with pytest.raises(UserError, match=message):
        check(*settings)
    assert not tiny_run.exists()


def test_what_only_the_other_machine_can_tell_is_left_to_it(check):
    check("--train.precision", "fp8", "--parallel.compile", "true", "--train.steps", 5)


def test_a_run_is_checked_against_the_checkpoint_it_would_go_on_from(check, copied):
    before = sorted(copied.rglob("*"))
    check("--train.steps", 50, "--train.precision", "auto")
    with pytest.raises(UserError, match=r"^run.resume: .* another config: optimizer.lr \(was 0.001, now 0.5\)"):
        check("--optimizer.lr", 0.5)
    assert sorted(copied.rglob("*")) == before


def test_who_has_a_run_folder(tmp_path):
    assert who_has(tmp_path) is None
    owner = RunOwner(tmp_path, print)
    assert f"process {os.getpid()} on " in who_has(tmp_path)
    owner.release()
    assert who_has(tmp_path) is None
    script = ("import sys, pathlib; from genscale.supervise.run_owner import RunOwner; "
              "RunOwner(pathlib.Path(sys.argv[1]), print)")
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, timeout=60)  # ends without a word
    assert who_has(tmp_path) is None


def test_what_was_submitted_is_found_again(tmp_path):
    array, runs = tmp_path / "tiny", [tmp_path / "tiny-seed0", tmp_path / "tiny-seed1"]
    first, second = new_folder(array), new_folder(array)
    assert (first.name, second.name) == ("0001", "0002")
    record(array, Submitted("12", str(first), None, tuple(map(str, runs))))
    for index, run in enumerate(runs):
        record(run, Submitted(f"12_{index}", str(first), f"{array}/logs/slurm-12_{index}.log", (str(run),)))
    record(runs[0], Submitted("15", str(second), "x.log", (str(runs[0]),)))
    assert (jobs_of(array), jobs_of(runs[0]), jobs_of(runs[1])) == (["12"], ["12_0", "15"], ["12_1"])
    assert runs_of([array]) == runs and runs_of([runs[1], array]) == [runs[1], runs[0]]
    assert submitted(runs[0])[0].log == f"{array}/logs/slurm-12_0.log" and submitted(tmp_path) == []


@pytest.mark.parametrize(("words", "setting"), [
    ("invalid partition specified: gpu", "--partition"),
    ("Batch job submission failed: Invalid account or account/partition combination specified", "--account"),
    ("Batch job submission failed: Requested node configuration is not available", "--nodes, --gpus-per-node"),
    ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "--time"),
    ("Batch job submission failed: Invalid generic resource (gres) specification", "--nodes, --gpus-per-node"),
    ("Batch job submission failed: Invalid job array specification", "--array"),
    ("Batch job submission failed: Invalid qos specification", "--qos"),
    ("Batch job submission failed: Memory required by task is not available", "--mem"),
    ("unrecognized option '--nicee=5'", "--sbatch, site.sbatch"),
    ("Batch job submission failed: Something new", "sbatch"),
])  # fmt: skip
def test_slurms_words_are_passed_on_with_the_setting_they_are_about(words, setting, monkeypatch):
    monkeypatch.setattr("genscale.cluster.slurm_commands._partitions", str)
    assert explain(words).startswith(setting) and words in explain(words)


@pytest.mark.parametrize(("arguments", "message"), [
    (("render",), "--config: name the YAML file of the run"),
    (("render", "--config", "none.yaml"), "--config: cannot read 'none.yaml'"),
    (("render", "--nods", "2"), "--nods: unknown setting (did you mean"),
    (("render", "--nodes", "0"), "nodes: must be a whole number of at least 1, not 0"),
    (("rendr",), "'rendr' is none of render, submit,"),
    (("status", "nowhere"), "nowhere: no such run folder"),
    (("cancel",), "name the run folders"),
    (("logs",), "name one run folder"),
])  # fmt: skip
def test_mistakes_on_the_command_line(arguments, message, genscale):
    assert message in genscale("slurm", *arguments).message()


@pytest.mark.parametrize("action", ["", "render", "submit", "resubmit", "status", "logs", "hold", "release", "cancel", "begin",
                                    "end"])
def test_every_action_has_a_help(action, genscale):
    shown = genscale("slurm", *action.split(), "--help")
    assert shown.code == 0 and f"usage: genscale slurm {action}" in shown.out


def test_settings_of_the_run_are_known_by_their_dots_and_after_two_dashes(genscale, tiny_config):
    script = genscale("slurm", "render", "--config", tiny_config, "--", "--train.steps", 9, "--run.name", "other").out
    assert script == genscale("slurm", "render", "--train.steps", 9, "--config", tiny_config, "--run.name=other").out
    assert "settings=(--train.steps 9)" in script and "/runs/other\n" in script
    assert "train.stepz: unknown" in genscale("slurm", "render", "--config", tiny_config, "--", "--train.stepz", 9).message()


def test_no_file_of_several_is_lost_and_a_flag_wins_over_all(genscale, tiny_config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("train: {steps: 7}\nrun: {name: other}\n")
    script = genscale("slurm", "render", "--run.dir", "/scratch/x", "--config", tiny_config, "--config", other).out
    assert all(line in script for line in (f"config={tiny_config}\n", f"settings=(--config={other})", "run=/scratch/x/other\n"))
    for words in (["--run.name", "mine", "--config", tiny_config, "--config", other],
                  ["--config", tiny_config, "--run.name", "mine", "--", "--config", other]):
        assert "/mine\n" in genscale("slurm", "render", *words).out
    swept = genscale("slurm", "render", "--array", "train.steps=5,6", "--train.steps", "9", "--config", tiny_config).out
    assert "settings=(--train.steps 9 " in swept and swept.index("--train.steps 9") < swept.index('"--train.steps=$value"')


def test_runs_of_an_array_are_checked_one_by_one(genscale, tiny_config):
    message = genscale("slurm", "render", "--config", tiny_config, "--array", "train.steps=5,0").message()
    assert message.startswith("train.steps: must be a whole number of at least 1, not 0")
    assert "have 1 names" in genscale("slurm", "render", "--config", tiny_config, "--array", "data.source=a/b,a-b").message()


def test_a_site_can_say_where_runs_lie(genscale, tiny_settings, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings))
    (tmp_path / "site.yaml").write_text("scratch: /scratch/me\n")
    words = ["slurm", "render", "--config", tmp_path / "tiny.yaml", "--site", tmp_path / "site.yaml"]
    assert "run=/scratch/me/runs/tiny\n" in genscale(*words).out
    assert f"run={tmp_path}/tiny\n" in genscale(*words, "--", "--run.dir", Path(tmp_path)).out


@pytest.mark.parametrize(("gres", "gpus"), [
    ("(null)", 0), ("gpu:2", 2), ("gpu:a100:8(S:0-1)", 8), ("nvme:1,gpu:h100:4(S:0-3),gpu:h200:2", 6), ("gpu_mem:40", 0),
])  # fmt: skip
def test_gpus_of_a_node_as_sinfo_shows_them(gres, gpus):
    assert gpus_in(gres) == gpus


@pytest.mark.parametrize(("settings", "message"), [
    ({"gpus_per_node": 8}, "--gpus-per-node: 8 GPUs on a node, and no node of partition main has more than 4"),
    ({"cpus_per_process": 9}, r"--cpus-per-process: 36 cores \(4 x 9\) on a node, and no node of .* has more than 32"),
    ({"nodes": 3}, "--nodes: 3 is more than the 2 nodes of partition main that have 4 GPUs and 32 cores"),
    ({"time": "2-0"}, "--time: 2-0 is more than partition main allows; nearest allowed: 1-12:00:00"),
])  # fmt: skip
def test_what_a_partition_has_not_is_not_asked_of_it(settings, message):
    """Slurm would let the job wait for ever, where it is not told to refuse it."""
    main = Partition("main", "1-12:00:00", (Node("a", 32, 4), Node("b", 32, 4), Node("c", 32, 0)))
    site = Site(gpus_per_node=4)
    check_fits(settle(JobSettings(nodes=2, time="1-12"), site, "tiny"), main)
    check_fits(settle(JobSettings(nodes=3, gpus_per_node=0), site, "tiny"), main)
    with pytest.raises(UserError, match=message):
        check_fits(settle(JobSettings(**settings), site, "tiny"), main)


def test_of_several_partitions_a_job_takes_the_one_that_it_fits(tool):
    tool("sinfo", 'echo "short*|a|32|gpu:4|1:00:00"; echo "long|a|32|gpu:4|7-00:00:00"; echo "long|b|32|gpu:4|7-00:00:00"')
    both = find_partition("short,long")
    assert both == Partition("short,long", "7-00:00:00", (Node("a", 32, 4), Node("b", 32, 4)))
    assert find_partition(None) == Partition("short", "1:00:00", (Node("a", 32, 4),))
    check_fits(settle(JobSettings(nodes=2, time="2-0"), Site(gpus_per_node=4), "tiny"), both)
    tool("sinfo", 'echo "free|a|32|gpu:4|infinite"; echo "long|a|32|gpu:4|7-00:00:00"')
    assert find_partition("free,long").time is None


def test_what_to_type_next_after_a_job(monkeypatch):
    from genscale.verbs.train import command

    words = ["--config", "a b.yaml", "--run.name", "x", "--train.steps", "5"]
    assert command(words) == "genscale train --config 'a b.yaml' --run.name x --train.steps 5"
    monkeypatch.setenv("GENSCALE_RUN", "runs/x")
    monkeypatch.setenv("SLURM_NNODES", "4")
    assert command(words) == "genscale slurm submit --nodes 4 --config 'a b.yaml' -- --run.name x --train.steps 5"
