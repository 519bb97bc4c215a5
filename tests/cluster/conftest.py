"""One cluster and one undisturbed run for all tests here. They are skipped where there is no Slurm or no root; .ci/run installs
Slurm (tests/cluster/mini-cluster.sh install)."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "faults")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(400))


@pytest.fixture(scope="session")
def jobs() -> ModuleType:
    """cluster_jobs.py: a cluster, and runs as jobs in it."""
    import cluster_jobs

    return cluster_jobs


@pytest.fixture(scope="session")
def cluster(jobs, genscale) -> Iterator:
    """A running cluster of three nodes: node0, node1, node2."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("jobs are timed, and run alone: pytest -m cluster tests/cluster")
    if reason := jobs.why_not():
        pytest.skip(reason)

    def submit(words: list[str], variables: dict[str, str]) -> str:
        with jobs.variables_set(variables):
            done = genscale(*words)
        assert done.code == 0, done.out + done.err
        return done.out

    folder = Path(os.environ.get("SLURM_MINI_DIR") or tempfile.mkdtemp(prefix="genscale-cluster-"))
    cluster = jobs.Cluster(folder, submit)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def campaign() -> ModuleType:
    """fault_campaign.py: runs held against each other."""
    import fault_campaign

    return fault_campaign


@pytest.fixture(scope="session")
def source(jobs, tmp_path_factory) -> Path:
    return jobs.text_source(tmp_path_factory.mktemp("source") / "text")


@pytest.fixture
def new_run(jobs, source, tmp_path) -> Callable:
    """`new_run(**settings)`: a run that was not started yet."""
    return lambda **settings: jobs.JobRun(tmp_path, source, **settings)


@pytest.fixture(scope="session")
def alone(jobs, genscale, source, tmp_path_factory):
    """The run in one process, without Slurm."""
    run = jobs.JobRun(tmp_path_factory.mktemp("alone"), source)
    done = genscale("train", *run.words())
    assert done.code == 0, done.err
    return run


@pytest.fixture(scope="session")
def undisturbed(jobs, cluster, source, tmp_path_factory):
    """The run in two processes on two nodes, to which nothing happens."""
    run = jobs.JobRun(tmp_path_factory.mktemp("undisturbed"), source)
    assert cluster.submit(run, "--nodes", "2", "--launcher", "accelerate").end()["Restarts"] == "0"
    return run
