"""What a site has run in a job: setup, modules, commands before and after, containers of pyxis; by bash, with stand-ins for
Slurm. There is no pyxis here: an srun that takes its options away, as the plugin does, stands for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from genscale.cluster.site import read_site
from genscale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(genscale, tool, tiny_config, tiny_run, tmp_path, monkeypatch):
    """`job(site, *flags, code=0, **variables)`: a job's script in bash; its exit code, and what was said and called."""
    monkeypatch.chdir(tmp_path)
    tool("srun", '[[ $* == *--container-image=* ]] && inside=1\necho "srun $*"\nwhile [[ $1 == --* ]]; do shift; done\n'
                 'INSIDE=$inside SLURMD_NODENAME=node7 exec "$@"')
    tool("scontrol", '[[ $* == show* ]] && echo node7 || echo "scontrol $*"')
    tool("squeue", "exit 0")
    tool("python", 'echo "python${INSIDE:+ in a container} $*"; env | grep LOADED; '
                   '[[ $* == *"slurm end"* ]] && exit "$CODE"; exit 0')
    (tiny_run / "jobs").mkdir(parents=True)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")

    def run(site, *flags, code=0, **variables):
        (tmp_path / "site.yaml").write_text(yaml.safe_dump({"gpus_per_node": 0, **site}))
        done = genscale("slurm", "render", "--config", tiny_config, "--site", "site.yaml", "--launcher", "srun", *flags)
        assert done.code == 0, done.err
        Path("job.sbatch").write_text(done.out)
        slurms = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node7", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "8",
                  "SLURMD_NODENAME": "node7", "CODE": str(code), **variables}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BASH_FUNC_")}
        ended = subprocess.run(["bash", "job.sbatch"], env={**kept, **slurms}, capture_output=True, text=True, timeout=60)
        return ended.returncode, (ended.stdout + ended.stderr).splitlines()

    return run


@pytest.mark.parametrize("line", ["source nowhere/activate", "module load cuda/99", "(exit 3)  # and more",
                                  "ls nowhere 2>/dev/null || exit 4"])
def test_a_setup_line_that_fails_ends_the_job_with_its_name(line, job, tiny_run):
    code, said = job({"setup": ["[ -f nowhere ] && source nowhere", "cd .", line, "echo never"]})
    number = {"s": 1, "m": 127, "(": 3, "l": 4}[line[0]]
    expected = f"job 77: site.setup: exit code {number} of `{line}`"
    assert code == 1 and said[-1] == f"error: {expected}" and not [each for each in said if each.startswith(("srun", "never"))]
    assert (tiny_run / "jobs" / "events.log").read_text().rstrip().endswith(expected)


def test_modules_are_loaded_without_a_login_shell(job, tmp_path):
    init = tmp_path / "modules" / "init" / "bash"
    init.parent.mkdir(parents=True)
    init.write_text('false\nmodule() { [ "$2" = cuda/12.8 ] && export LOADED="$LOADED $2"; }\n')
    home = {"MODULESHOME": str(tmp_path / "modules")}
    code, said = job({"modules": ["cuda/12.8"]}, **home)
    assert code == 0 and "LOADED= cuda/12.8" in said
    code, said = job({"setup": ["module load cuda/12.8", "module load nccl"]}, **home)
    assert code == 1 and said[-1] == "error: job 77: site.setup: exit code 1 of `module load nccl`"


SITE = {"node_setup": ["echo 'on each' $SLURMD_NODENAME"], "pre_commands": ["echo before $run", "export LOADED=pre"],
        "post_commands": ["exit 9", "echo after $code"]}  # fmt: skip


def test_commands_before_and_after_the_training(job, tiny_run):
    code, said = job(SITE, code=3)
    order = [next(number for number, line in enumerate(said) if line.startswith(start)) for start in (
        "on each node7", f"before {tiny_run}", "python -m genscale slurm begin", "python -m genscale train",
        "python -m genscale slurm end", "after 3")]
    assert code == 3 and order == sorted(order) and "LOADED=pre" in said
    assert "genscale: job 77: site.post_commands: exit code 9 of `exit 9`" in said
    code, said = job(SITE, code=75)
    assert code == 0 and said.index("after 75") < said.index("scontrol requeue 77")


def test_where_python_cannot_be_started_the_job_ends_or_goes_to_another_node(job, tool, tiny_run):
    """The first life ends with a reason; a job that has lived is requeued twice, without the node."""
    tool("python", "exit 127")
    jobs, words = tiny_run / "jobs", "job 77: genscale cannot be started on node7 (the log says why)"
    code, said = job({})
    assert code == 1 and said[-1] == f"error: {words}" and (jobs / "events.log").read_text().endswith(f"{words}\n")
    assert not (jobs / "exclude").exists()
    (jobs / "events.log").unlink()
    (jobs / "lives.json").write_text('{"lives": []}')
    for again in (True, True, False):
        code, said = job({})
        assert code == (0 if again else 1) and ("scontrol requeue 77" in said) == again, said
        assert not again or "scontrol update JobId=77 ExcNodeList=node7" in said
    assert (jobs / "events.log").read_text().count(f"{words}; requeued, for it has lived before, without node7\n") == 2


@pytest.mark.parametrize(("key", "without"), [("setup", ", without node7"), ("node_setup", ""),
                                              ("pre_commands", ", without node7")])
def test_a_command_that_fails_in_a_later_life_is_tried_again_elsewhere(key, without, job, tiny_run):
    """A file server that is away for a minute must not end a job of weeks."""
    (tiny_run / "jobs" / "lives.json").write_text('{"lives": []}')
    ended = [job({key: ["(exit 7)"]}) for _ in range(3)]
    assert [code for code, _ in ended] == [0, 0, 1]
    assert ["scontrol requeue 77" in said for _, said in ended] == [True, True, False]
    assert ("scontrol update JobId=77 ExcNodeList=node7" in ended[0][1]) == bool(without)
    events = (tiny_run / "jobs" / "events.log").read_text().splitlines()
    assert all(line.partition(" job 77: ")[2].startswith(f"site.{key}: ") for line in events)
    assert [line.endswith(f"; requeued, for it has lived before{without}") for line in events] == [True, True, False]


@pytest.mark.parametrize(("nodes", "left_out"), [("node7", False), ("node7\nnode7\nnode8", True)])
def test_no_node_is_left_out_that_the_job_could_not_do_without(nodes, left_out, job, tool, tiny_run):
    """It would wait in the queue for ever."""
    tool("sinfo", f"printf '{nodes}\n'")
    (tiny_run / "jobs" / "lives.json").write_text('{"lives": []}')
    code, said = job({"pre_commands": ["(exit 7)"]})
    assert code == 0 and "scontrol requeue 77" in said
    assert ("scontrol update JobId=77 ExcNodeList=node7" in said) == left_out
    assert ("genscale: job 77: node7 is not left out: the partition has 0 other nodes" in said) != left_out


@pytest.mark.parametrize("line", ["ls /no-such-folder 2>/dev/null", "false || exit 2"])
@pytest.mark.parametrize(("key", "where"), [("node_setup", "error: node7: "), ("pre_commands", "error: job 77: ")])
def test_a_command_before_the_training_that_fails_ends_the_job(key, where, line, job):
    code, said = job({**SITE, key: ["true", line, "echo never"]})
    assert code == 1 and said.count(f"{where}site.{key}: exit code 2 of `{line}`") == 1
    assert not [line for line in said if line.startswith(("python", "never"))]


PYXIS = {"container_kind": "pyxis", "container": "nvcr.io#nvidia/pytorch:25.09", "container_mounts": ["/data", "/a b:/c:ro"],
         "scratch": "/scratch/me"}  # fmt: skip


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
def test_everything_of_python_runs_in_a_container_of_pyxis(launcher, job, tiny_run, tmp_path):
    code, said = job(PYXIS, "--launcher", launcher, code=4)
    ran = [line for line in said if line.startswith("python")]
    assert code == 4 and len(ran) == 3 and all(line.startswith("python in a container ") for line in ran), ran
    steps = [line for line in said if line.startswith("srun ")]
    mounts = f"{tmp_path}:{tmp_path},/scratch/me:/scratch/me,{tiny_run.parent}:{tiny_run.parent},/data:/data,/a b:/c:ro"
    for step in steps:
        assert f"--container-image=nvcr.io#nvidia/pytorch:25.09 --container-mounts={mounts} " in step
        assert f"--container-workdir={tmp_path} " in step
    assert "--nodes=1 --ntasks=1 --nodelist=node7 python" in steps[-1] and "source" not in Path("job.sbatch").read_text()


@pytest.mark.parametrize(("text", "message"), [
    ("container_kind: docker", "site.container_kind: 'docker' is not one of apptainer, pyxis"),
    ("container_mounts: ['/a,/b']", "site.container_mounts: '/a,/b' is not a path"),
    ("pre_commands: x", "site.pre_commands: must be a list of texts"),
    ("post_commands: [export API_TOKEN=abcd]", "site.post_commands: API_TOKEN in"),
])  # fmt: skip
def test_mistakes_in_a_site(text, message, tmp_path):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_site(str(tmp_path / "site.yaml"))
