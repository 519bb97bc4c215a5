"""Options of sbatch that are not genscale's own, GPUs by kind, and time limits that are none."""

from __future__ import annotations

import shlex

import pytest

from genscale.cluster.gpus import gpus_in
from genscale.cluster.job import JobSettings, settle
from genscale.cluster.job_records import Submitted, record
from genscale.cluster.partition import Node, Partition, check_fits
from genscale.cluster.site import Site
from genscale.cluster.slurm_commands import options_in
from genscale.errors import UserError
from genscale.verbs.train import command


def options(site=(), typed=(), **named):
    return settle(JobSettings(sbatch=list(typed), **named), Site(sbatch=list(site), gpus_per_node=2), "tiny").options


def test_any_option_of_sbatch_by_name_or_as_it_is():
    named = {"qos": "long", "reservation": "r", "constraint": "a100&ib", "exclude": "node[3-4]", "nodelist": "node1",
             "mem": "0", "mail_type": "END,FAIL", "mail_user": "me@lab", "comment": "it's my run", "begin": "now+1hour",
             "dependency": "afterok:7"}
    assert options(**named, exclusive=True) == (*(f"--{name.replace('_', '-')}={value}" for name, value in named.items()),
                                                "--exclusive")
    assert options(["--mem=0 --hint 'no multithread'"], ["--nice=5", "--comment=my own run", "--exclusive"]) == \
        ("--mem=0", "--hint=no multithread", "--nice=5", "--comment=my own run", "--exclusive")


def test_what_is_typed_comes_before_the_site_and_a_name_before_both():
    site = ["--qos=site", "--mem=0"]
    assert options(site, ["--qos=typed"]) == ("--mem=0", "--qos=typed")
    assert options(site, ["--qos=typed", "--nice=1"], qos="named") == ("--mem=0", "--nice=1", "--qos=named")


@pytest.mark.parametrize(("word", "instead"), [
    ("--time=1:00:00", "and use --time"), ("--nodes=2", "and use --nodes"), ("--gpus-per-node=4", "and use --gpus-per-node"),
    ("--gpus=4", "and use --gpus-per-node"), ("--gres=gpu:4", r"and use --gres \(in a site, gres: gpu:4\)"),
    ("--gres=nvme:1,gpu:a:1", "and use --gres"), ("--array=0-3", "and use --array"), ("--part=gpu", "and use --partition"),
    ("--no-requeue", "and use --max-requeues"), ("--signal=TERM@9", "and use --signal and --lead"),
    ("--output=x.log", "for the life of a job"), ("--wait", "for the life of a job"),
    ("--export=NONE", "for the life of a job"),
    ("--gpus-per-task=1", "and use --gpus-per-task"), ("--ntasks 4", "and use --tasks-per-node"),
])  # fmt: skip
def test_an_option_that_would_beat_ours_is_refused(word, instead):
    for setting, given in (("site.sbatch", {"site": [word]}), ("--sbatch", {"typed": [word]})):
        with pytest.raises(UserError, match=rf"^{setting}: {word.split()[0]}.* would beat what genscale asks for; .*{instead}"):
            options(**given)


@pytest.mark.parametrize("word", ["qos=long", "-q long", "", "--qos=a b --mem=0", "--qos='a", "--comment=a\nb"])
def test_what_is_no_option(word):
    with pytest.raises(UserError, match=r"^--sbatch: "):
        options(typed=[word])


def test_options_reach_sbatch_through_the_script_as_they_are(genscale, tiny_config):
    comment = "it's #1: a \"run\""
    words = ("--sbatch=--nice=5", "--sbatch", "--mem=1.5G", "--comment", comment)
    done = genscale("slurm", "render", "--config", tiny_config, *words)
    assert {"--nice=5", "--mem=1.5G", f"--comment={comment}"} <= set(options_in(done.out))


def asked(site=None, **settings):
    return settle(JobSettings(**settings), site or Site(gpus_per_node=2), "tiny").gpus


@pytest.mark.parametrize(("site", "settings", "count", "option"), [
    ({"gpus_per_node": "a100:4"}, {}, 4, ["--gpus-per-node=a100:4"]),
    ({"gpus_per_node": "a100:4"}, {"gpus_per_node": "2"}, 2, ["--gpus-per-node=a100:2"]),
    ({"gpus_per_node": "a100:4"}, {"gpus_per_node": "h100:2"}, 2, ["--gpus-per-node=h100:2"]),
    ({"gres": "gpu:h100:8"}, {}, 8, ["--gres=gpu:h100:8"]),
    ({"gres": "nvme:1,gpu:h100:8"}, {"gpus_per_node": "4"}, 4, ["--gres=gpu:h100:4,nvme:1"]),
    ({"gres": "gpu:h100:8"}, {"gpus_per_node": "0"}, 0, []),
    ({"gres": "gpu:8"}, {"gres": "gpu"}, 1, ["--gres=gpu"]),
    ({}, {"gres": "gpu:2"}, 2, ["--gres=gpu:2"]), ({"gpus_per_node": 0}, {}, 0, []),
])  # fmt: skip
def test_gpus_by_kind_and_for_old_slurms(site, settings, count, option):
    gpus = asked(Site(**site), **settings)
    assert (gpus.count, gpus.option) == (count, option)


@pytest.mark.parametrize(("settings", "message"), [
    ({"gpus_per_node": "a100"}, "--gpus-per-node: must be a whole number, not 'a100'; or a kind and a number, as a100:4"),
    ({"gpus_per_node": "-1"}, "--gpus-per-node: must be a whole number"),
    ({"gres": "gpu:a:2,gpu:b:2"}, "--gres: gpu:a:2,gpu:b:2 mixes kinds of GPUs"),
    ({"gres": "nvme:1"}, "--gres: nvme:1 has no GPUs"), ({"gres": "gpu:2 x"}, "--gres: must be as sbatch takes it"),
    ({"gres": "gpu:2", "gpus_per_node": "2"}, "--gres: gpu:2 says how many GPUs a node has; leave out --gpus-per-node"),
    ({"gpus_per_task": 1}, "--gpus-per-task: 1 with --launcher accelerate"),
    ({"gpus_per_task": 2, "launcher": "srun"}, "--gpus-per-task: 2 with --launcher srun"),
])  # fmt: skip
def test_gpus_that_cannot_be_asked_for(settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        asked(**settings)


def test_a_kind_that_a_partition_has_not_is_not_asked_of_it():
    gres = "gpu:a100:4(S:0-1)"
    main = Partition("main", None, (Node("a", 32, gpus_in(gres), gres), Node("b", 32, 8, "gpu:h100:8")))
    check_fits(settle(JobSettings(gpus_per_node="A100:4", cpus_per_process=8), Site(), "tiny"), main)
    with pytest.raises(UserError, match="--gpus-per-node: 8 a100 GPUs on a node, and no node of .* has more than 4"):
        check_fits(settle(JobSettings(gpus_per_node="a100:8", cpus_per_process=1), Site(), "tiny"), main)
    with pytest.raises(UserError, match="--nodes: 2 is more than the 1 nodes of partition main that have 2 h100 GPUs"):
        check_fits(settle(JobSettings(nodes=2, gpus_per_node="h100:2"), Site(), "tiny"), main)


def test_each_task_of_srun_has_a_gpu_of_its_own_as_device_0(genscale, tiny_config):
    words = ("slurm", "render", "--config", tiny_config, "--launcher", "srun", "--gpus-per-node", "a100:4")
    script = genscale(*words, "--gpus-per-task", 1).out
    assert "    --gpus-per-task=a100:1 --cpu-bind=cores" in script and "LOCAL_RANK=0\n" in script
    assert "--gpus-per-node=a100:4" in options_in(script)  # of the job; its first step looks at whole nodes
    assert "--gpus-per-task" not in genscale(*words).out and "LOCAL_RANK=$SLURM_LOCALID" in genscale(*words).out


@pytest.mark.parametrize("time", ["UNLIMITED", "infinite", "0", "0:00", "-1"])
def test_no_limit_is_no_time_limit(time, genscale, tool, tiny_config):
    words = ("slurm", "render", "--config", tiny_config, "--partition", "gpu", f"--time={time}")
    tool("sinfo", 'echo "gpu|a|32|gpu:4|7-00:00:00"')
    assert genscale(*words).message().endswith("; nearest allowed: 7-00:00:00")
    tool("sinfo", 'echo "gpu|a|32|gpu:4|infinite"')
    said = genscale(*words).message()
    assert said.startswith(f"--time: '{time}' is not a time limit; ") and said.endswith("; nearest allowed: 365-00:00:00")


def test_a_run_waits_for_another(genscale, tool, tiny_config, tmp_path):
    array, one = tmp_path / "sweep", tmp_path / "one"
    record(array, Submitted("12", "k", None, (str(tmp_path / "sweep-seed0"),)))
    record(one, Submitted("15", "k", None, (str(one),)))
    words = ("slurm", "render", "--config", tiny_config, "--after", array, "--after", one)
    tool("squeue", 'echo "12_0|RUNNING|None|a|1:00"; echo "12_1|PENDING|Priority||1:00"; echo "15|PENDING|Priority||1:00"')
    assert "--dependency=singleton,afterok:12:15" in options_in(genscale(*words, "--dependency", "singleton").out)
    tool("squeue", "exit 0")
    assert f"--after: {array} has no job in the queue" in genscale(*words).message()
    for run in (array, one):
        (run / "ended.json").write_text('{"how": "complete"}')
    assert "--dependency" not in genscale(*words).out


def test_what_to_type_next_keeps_what_the_job_was_submitted_with(genscale, tool, tiny_config, tiny_run, tmp_path, monkeypatch):
    for name, said in (("sbatch", "echo 12"), ("squeue", "exit 0"), ("sinfo", "exit 1"), ("python", "exit 0")):
        tool(name, said)
    site = tmp_path / "my site.yaml"
    site.write_text("setup: []\ncpus_per_process: 1\n")
    flags = ["--site", str(site), "--time", "2:00:00", "--gpus-per-node", "0", "--tasks-per-node", "2", "--sbatch=--nice=5"]
    done = genscale("slurm", "submit", "--config", tiny_config, "--begin", "now+1hour", *flags, "--launcher=srun")
    assert done.code == 0, done.err
    script = (tiny_run / "jobs" / "0001" / "job.sbatch").read_text()
    line = next(line for line in script.splitlines() if line.startswith("export GENSCALE_SUBMIT="))
    (_, value) = shlex.split(line, comments=True)
    monkeypatch.setenv("GENSCALE_RUN", str(tiny_run))
    monkeypatch.setenv("GENSCALE_SUBMIT", value.partition("=")[2])
    typed = command(["--config", "a b.yaml", "--train.steps", "5"])
    assert shlex.split(typed) == ["genscale", "slurm", "submit", *flags, "--launcher=srun", "--config", "a b.yaml", "--",
                                  "--train.steps", "5"]
