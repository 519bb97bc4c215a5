"""What a job asks of Slurm: time limits, arrays, processes a node; and the settings of a site."""

from __future__ import annotations

from pathlib import Path

import pytest

from genscale.cluster.job import JobSettings, settle
from genscale.cluster.site import Site, read_site
from genscale.errors import UserError


def job(**settings):
    return settle(JobSettings(**settings), Site(gpus_per_node=2, cpus_per_process=4), "tiny")


@pytest.mark.parametrize(("time", "seconds"), [
    ("10", 600), ("10:30", 630), ("1:00:00", 3600), ("1-0", 86400), ("1-02", 93600), ("1-02:30", 95400), ("2-00:00:30", 172830),
])  # fmt: skip
def test_time_limits_in_the_formats_of_sbatch(time, seconds):
    assert job(time=time, lead=seconds - 1).time == time
    with pytest.raises(UserError, match=f"below {seconds} s"):
        job(time=time, lead=seconds)


@pytest.mark.parametrize("time", ["", "a day", "24h", "1:2:3:4", "1-", "-5", "0", "0:00:00", "1:00:00 "])
def test_other_words_are_no_time_limit(time):
    with pytest.raises(UserError, match=r"^--time: .* is not a time limit; write \[DAYS-\]HOURS:MINUTES:SECONDS"):
        job(time=time)


def test_processes_follow_the_gpus():
    assert (job(nodes=3).world_size, job().processes_per_node) == (6, 2)
    assert (job(gpus_per_node=0).processes_per_node, job(gpus_per_node=0, tasks_per_node=3).processes_per_node) == (1, 3)
    with pytest.raises(UserError, match="--tasks-per-node: 3 on 2 GPUs a node"):
        job(tasks_per_node=3)


def test_a_flag_comes_before_the_site():
    site = Site(partition="cpu", account="one", container="a.sif", gpus_per_node=4, cpus_per_process=6)
    plain = settle(JobSettings(), site, "tiny")
    assert (plain.partition, plain.account, plain.container, plain.gpus_per_node, plain.cpus_per_process) == \
        ("cpu", "one", "a.sif", 4, 6)
    flags = JobSettings(partition="gpu", account="two", container="b.sif", gpus_per_node=1, cpus_per_process=2)
    other = settle(flags, site, "tiny")
    assert (other.partition, other.account, other.container, other.gpus_per_node, other.cpus_per_process) == \
        ("gpu", "two", "b.sif", 1, 2)


@pytest.mark.parametrize(("text", "key", "values", "for_sbatch", "first_name"), [
    ("seed=0-4", "run.seed", ("0", "1", "2", "3", "4"), "0-4", "tiny-seed0"),
    ("seed=3-5%2", "run.seed", ("3", "4", "5"), "3-5%2", "tiny-seed3"),
    ("seed=7,5", "run.seed", ("7", "5"), "0-1", "tiny-seed7"),
    ("optimizer.lr=1e-3,3e-4", "optimizer.lr", ("1e-3", "3e-4"), "0-1", "tiny-lr1e-3"),
    ("data.source=a/b.txt", "data.source", ("a/b.txt",), "0-0", "tiny-sourcea-b.txt"),
    ("data.source=²", "data.source", ("²",), "0-0", "tiny-source-"),
    ("seed=4", "run.seed", ("4",), "4-4", "tiny-seed4"),
    ("seed=1000-1001", "run.seed", ("1000", "1001"), "0-1", "tiny-seed1000"),  # by default Slurm counts to 1000
])  # fmt: skip
def test_arrays(text, key, values, for_sbatch, first_name):
    array = job(array=[text]).array
    (axis,) = array.axes
    assert (axis.key, axis.values, array.for_sbatch(), array.name_of("tiny", array.elements()[0])) == \
        (key, values, for_sbatch, first_name)


@pytest.mark.parametrize("text", [
    "seed", "seed=", "seed=4-0", "seed=1,,2", "seed=1,1", "seed=0-4%0", "steps=1,2", "run.name=a,b", "seed=0-99999",
])  # fmt: skip
def test_what_is_no_array(text):
    with pytest.raises(UserError, match=r"^--array: "):
        job(array=[text])


def test_a_site_is_read_from_the_user_or_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_site() == Site()
    Path("launch").mkdir()
    Path("launch/site.yaml").write_text("partition: here\nenvironment: {A: 1}\n")
    assert read_site() == Site(partition="here", environment={"A": "1"})
    (tmp_path / "config" / "genscale").mkdir(parents=True)
    (tmp_path / "config" / "genscale" / "site.yaml").write_text("partition: mine\n")
    assert read_site() == Site(partition="mine")
    assert read_site("launch/site.yaml").partition == "here"


def test_the_site_file_of_the_repository_sets_nothing_and_names_every_setting():
    file = Path(__file__).resolve().parents[2] / "launch" / "site.yaml"
    assert read_site(str(file)) == Site()
    text = file.read_text()
    for name in Site.__dataclass_fields__:
        assert f"# {name}: " in text, name


@pytest.mark.parametrize(("text", "message"), [
    ("partitoin: gpu", r"^site.partitoin: unknown key .* \(did you mean 'partition'\?\)"),
    ("gpus_per_node: many", r"^site.gpus_per_node: must be a whole number, not 'many'"),
    ("gpus_per_node: true", r"^site.gpus_per_node: must be a whole number, not True"),
    ("cpus_per_process: 0", r"^site.cpus_per_process: must be a whole number, not 0"),
    ("sbatch: [qos=long]", r"^site.sbatch: must be options of sbatch, as --qos=long, not 'qos=long'"),
    ("modules: cuda", r"^site.modules: must be a list of texts"),
    ("environment: [A]", r"^site.environment: must be a mapping of variables"),
    ("environment: {'A; rm': 1}", r"^site.environment: must be a mapping of variables"),
    ("environment: {A: }", r"^site.environment: must be a mapping of variables"),
    ("environment: {A: [b]}", r"^site.environment: must be a mapping of variables"),
    ("environment: {Ä: 1}", r"^site.environment: must be a mapping of variables"),
    ("partition: gpu low", r"^site.partition: 'gpu low' is not a name that Slurm could have \(in "),
    ("account: a;b", r"^site.account: 'a;b' is not a name that Slurm could have \(in "),
    ("container_command: run -v '$PWD", r"^site.container_command: run -v '\$PWD is no command that a job's script can hold"),
    ("container_command: run -e A=\"'b'\"", r"^site.container_command: .* is no command that a job's script can hold"),
    ("[a]", r"must hold settings like"),
    ("a: b: c", r"is not valid YAML"),
])  # fmt: skip
def test_mistakes_in_a_site_file(text, message, tmp_path):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_site(str(tmp_path / "site.yaml"))


def test_a_site_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"^--site: cannot read .* \(No such file or directory\)"):
        read_site(str(tmp_path / "none.yaml"))
