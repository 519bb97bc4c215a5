"""A data server that is down, as a run sees it: waited for where the run goes on, and else no mistake of the run's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genscale.cluster.job_life import why_not_again
from genscale.cluster.lives import Life
from genscale.data.readers import TableShard, damaged
from genscale.data.spec import Spec
from genscale.errors import SourceLost

TEXTS = [f"document {i} of the server, with words to learn from" for i in range(200)]
CONTENT = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture
def down(tmp_path: Path, serve, outage) -> tuple[str, Callable]:
    """The URL of a file, and what ends its server, which returns what starts it again."""
    (tmp_path / "a.jsonl").write_bytes(CONTENT)
    url, _ = serve(tmp_path)
    started = serve.servers

    def end() -> Callable[[], None]:
        again = outage(started[-1])
        return lambda: started.append(again())
    return f"{url}/a.jsonl", end


@contextlib.contextmanager
def after(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def said(run: Path) -> tuple[str, int]:
    ended = json.loads((run / "ended.json").read_text())
    return ended["how"], ended["exit_code"]


def requeued(run: Path) -> bool:
    how, code = said(run)
    life = Life("7", 0, ("node0",), "", 0, end_step=2, how=how, code=code)
    return why_not_again(life, [life], max_requeues=10) is None


def words(config: Path, url: str, steps: int, minutes: float = 5.0) -> list[object]:
    return ["train", "--config", config, "--data.source", url, "--data.sequence_length", 16, "--data.lanes", 2,
            "--data.validation_blocks", 2, "--data.retry_minutes", minutes, "--train.steps", steps]


def test_a_run_that_goes_on_waits_for_its_server(down, genscale, tiny_config, tiny_run) -> None:
    url, end = down
    assert genscale(*words(tiny_config, url, 2)).code == 0
    again, started = end(), time.monotonic()
    with after(1.0, again):
        done = genscale(*words(tiny_config, url, 4))
    assert done.code == 0 and time.monotonic() - started > 1, done.err
    assert said(tiny_run) == ("complete", 0) and (tiny_run / "checkpoints" / "step-00000004").is_dir()
    end()
    lost = genscale(*words(tiny_config, url, 6, minutes=0.03)).message_of_run()
    assert lost.startswith(f"data.source={url}: cannot be read (Connection refused; tried for 0.03 min); try again later")
    assert said(tiny_run) == ("lost", 2) and requeued(tiny_run)


def test_a_first_start_does_not_wait_but_in_a_job_that_was_requeued(down, genscale, tiny_config, tiny_run, monkeypatch) -> None:
    url, end = down
    again, started = end(), time.monotonic()
    assert "Connection refused" in genscale(*words(tiny_config, url, 2)).message_of_run()
    assert time.monotonic() - started < 3
    assert said(tiny_run) == ("failed", 2) and not requeued(tiny_run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with after(1.0, again):
        assert genscale(*words(tiny_config, url, 2)).code == 0


def test_a_server_lost_on_the_way_is_told_as_such(tmp_path, broken_server, genscale, tiny_config, tiny_run) -> None:
    """Its first answer, about the size, comes; those about the content do not."""
    (tmp_path / "a.jsonl").write_bytes(CONTENT)
    url, server = broken_server(tmp_path)
    server.faults = ["503"] * 1000
    lost = genscale(*words(tiny_config, f"{url}/a.jsonl", 2, minutes=0.02)).message_of_run()
    assert "tried for data.retry_minutes=0.02" in lost and said(tiny_run) == ("lost", 2)


@pytest.mark.slow
def test_several_processes_tell_it_too(down, genscale_process, tiny_config, tiny_run) -> None:
    url, end = down
    assert genscale_process(*words(tiny_config, url, 2), "--processes", 2).code == 0
    end()
    lost = genscale_process(*words(tiny_config, url, 4, minutes=0.03), "--processes", 2)
    assert "cannot be read (Connection refused" in lost.one_error() and said(tiny_run) == ("lost", 2)


HUB_SCRIPT = """
import sys

import datasets

from genscale.data.spec import Spec
from genscale.data.locations import of_a_run_that_goes_on, open_hub
from genscale.data.readers import find_shards
from genscale.errors import UserError

datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
for line in sys.stdin:
    try:
        if line.split()[0] == "open":
            with of_a_run_that_goes_on():
                shards = find_shards(Spec("data.source", "someone/corpus", retry_minutes=float(line.split()[1])), at_least=1)
        print(len([row for shard in shards for row in shard.rows()]), flush=True)
    except UserError as error:
        print(type(error).__name__, error, flush=True)
"""


def test_the_hubs_silence_is_no_damage() -> None:
    from huggingface_hub.utils import get_session

    shard = TableShard("someone/corpus@main", 0, Spec("data.source", "someone/corpus"))
    with pytest.raises(Exception) as caught:
        get_session().get("http://127.0.0.1:9/datasets/someone/corpus/resolve/main/train.jsonl")
    lost = damaged(shard, caught.value)
    assert isinstance(lost, SourceLost) and "the hub does not answer (ConnectError: " in str(lost), str(lost)
    assert "damaged" in str(damaged(shard, ValueError("no JSON")))


@pytest.mark.slow
def test_a_hub_that_is_down_is_waited_for_and_told(tmp_path, serve_hub, outage) -> None:
    url = serve_hub("someone/corpus", {"train.jsonl": CONTENT})
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_OFFLINE", None)
    process = subprocess.Popen([sys.executable, "-c", HUB_SCRIPT], env=environment, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, cwd=tmp_path)

    def ask(line: str) -> str:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    started = serve_hub.servers
    again = outage(started[-1])
    try:
        assert ask("open 0.03").startswith("SourceLost data.source=someone/corpus: the hub does not answer (ConnectError")
        with after(3.0, lambda: started.append(again())):
            assert ask("open 1") == str(len(TEXTS))
        outage(started[-1])
        lost = ask("read")
        assert lost.startswith(f"{SourceLost.__name__} data.source=someone/corpus: reading someone/corpus@"), lost
        assert "broke off: the hub does not answer (" in lost and "damaged" not in lost
    finally:
        process.stdin.close()
        process.wait(timeout=30)
