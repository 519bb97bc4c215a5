"""Programs and servers that judge: only what the site allows, within limits, asked again where they fail."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import yaml

import genscale
from genscale.cluster.site import read_site
from genscale.errors import SourceLost, UserError
from genscale.rewards import program, web
from genscale.rewards.base import Answer
from genscale.rewards.collection import Rewards, build_rewards
from genscale.supervise.run_folder import config_dict

JUDGE = f"#!{sys.executable} -IS\n" + """
import json, os, resource, signal, sys, time
def fault():
    # Once, and well ever after.
    flag = sys.argv[1] if len(sys.argv) > 1 else ""
    if not flag or os.path.exists(flag): return False
    open(flag, "w").close()
    return True
for line in sys.stdin:
    text = json.loads(line)["text"]
    if text == "once" and fault(): sys.exit("a bad day")
    if text == "hang once" and fault(): time.sleep(100)
    if text == "hang": time.sleep(100)
    if text == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if text == "memory": x = bytearray(2**31)
    if text == "nonsense": print("hello", flush=True); continue
    if text == "two": print("1"); print("2", flush=True); continue
    if text == "nan": print("NaN", flush=True); continue
    if text == "loud": print("x" * 2**21, flush=True); continue
    if text == "environment": print(len(set(os.environ) - {"PATH", "LANG", "LC_CTYPE"}), flush=True); continue
    if text == "limits": print(resource.getrlimit(resource.RLIMIT_CPU)[1], flush=True); continue
    if text == "flood": sys.stderr.write("x" * 3_000_000); print(1, flush=True); continue
    if text == "children":
        for number in range(9):
            if os.fork() == 0:
                if number % 3 > 0: os.setsid()
                if number % 3 > 1 and os.fork(): os._exit(0)  # whose child is nobody's, but for the program
                time.sleep(100)
        print(1, flush=True); continue
    if text == "deep": print("[" * 500_000, flush=True); continue
    if text == "word": print('"0.5"', flush=True); continue
    if text == "session": print(int(os.getsid(0) == os.getpid()), flush=True); continue
    print(json.dumps({"reward": len(text) + len(json.loads(line)["row"])}), flush=True)
"""


def answers(*texts: str, **row: object) -> list[Answer]:
    return [Answer("?", text, row, True, 5, member) for member, text in enumerate(texts)]


@pytest.fixture
def site(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Writes the site's file, with the judge above as `judge`; `site(seconds=1)` sets its limits."""
    own = tmp_path / "judge"
    own.write_text(JUDGE)
    own.chmod(0o755)
    file = tmp_path / "site.yaml"
    monkeypatch.setenv("GENSCALE_SITE", str(file))

    def write(addresses: tuple[str, ...] = (), **limits: object) -> Path:
        judge = {"command": [str(own), str(tmp_path / "flag")], **limits}
        file.write_text(yaml.safe_dump({"rewards": {"programs": {"judge": judge}, "addresses": list(addresses)}}))
        return file

    write()
    return write


@pytest.fixture
def judge(site) -> Iterator[Callable[..., Rewards]]:
    made = []

    def build(**settings: object) -> Rewards:
        made.append(build_rewards([{"name": "program", "program": "judge", **settings}], "text"))
        return made[-1]

    yield build
    for rewards in made:
        rewards.close()


def test_one_process_answers_line_by_line_in_a_closed_house(judge, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    rewards, before = judge(columns=["tests"]), set(psutil.Process().children())
    assert rewards.columns == ("tests",)
    _, total = rewards.score(1, answers("a", "abc", "environment", "session", tests="t", other="o"))
    assert total.tolist() == [2, 4, 0, 1]
    (process,) = set(psutil.Process().children()) - before
    rewards.score(2, answers("x" * 300_000, tests="t"))  # more than a pipe holds
    assert set(psutil.Process().children()) - before == {process}
    rewards.close()
    assert not process.is_running()


def test_what_floods_its_errors_or_forks_is_drained_and_ended(judge):
    rewards, before = judge(), set(psutil.Process().children(recursive=True))
    assert rewards.score(1, answers("flood", "children"))[1].tolist() == [1, 1]
    started = set(psutil.Process().children(recursive=True)) - before
    assert len(started) >= 10
    rewards.close()
    assert not psutil.wait_procs(started, timeout=20)[1]


def test_what_fails_once_is_asked_again_in_a_new_process(judge, caplog):
    assert judge().score(1, answers("once", "ab"))[1].tolist() == [4, 2]
    assert "program judge for sample 5, answer 0: it has ended with exit code 1: a bad day; it is asked again" in caplog.text


@pytest.mark.parametrize(("text", "why"), [
    ("crash", "it has ended by SIGSEGV"), ("memory", "it has ended with exit code 1: MemoryError"),
    ("nonsense", "said b'hello', and neither a number nor"), ("two", "said more than it was asked for"),
    ("deep", r"said b'\[\[\[.*', and neither a number nor"), ("word", r"gave \['0.5'\], not a number"),
    ("nan", "gave nan"), ("loud", "said more than 1,048,576 bytes"),
])  # fmt: skip
def test_what_fails_three_times_ends_the_run_by_name(judge, site, text, why):
    site(memory_mb=512)
    message = rf"objective.rewards\[0\] \(program\): program judge for sample 5, answer 1: {why}.*; asked 3 times"
    with pytest.raises(UserError, match=message):
        judge().score(1, answers("ok", text))


def test_the_sites_limits_are_the_programs_and_a_wait_within_them_is_progress(judge, site, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "BEAT_SECONDS", 0.1)
    site(cpu_seconds=77)
    assert judge().score(1, answers("limits"))[1].tolist() == [77]
    site(seconds=0.4)
    rewards, noted = judge(), []
    rewards.open(tmp_path, 0, 0, noted.append)
    with pytest.raises(UserError, match=r"no reply in 0\.4 seconds; asked 3 times"):
        rewards.score(1, answers("hang"))
    assert noted[0] == "step 1, reward program" and noted.count("step 1, reward program, 0 seconds") >= 6


def test_a_program_ends_with_the_process_that_asked_it(site, tmp_path):
    script = ("import os; from genscale.rewards.collection import build_rewards; from genscale.rewards.base import Answer\n"
              "r = build_rewards([{'name': 'program', 'program': 'judge'}], 'text')\n"
              "r._parts[0][1].judge([Answer('?', 'a', {}, True, 0, 0)])\n"
              "print(r._parts[0][1]._process.pid, flush=True); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout))


# --- a server -----------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers with what the test puts into `replies`, one a request; and with the lengths of the texts when there is none."""

    protocol_version = "HTTP/1.1"  # one of 1.0 is read another way
    replies: list[object] = []
    seen: list[dict] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        reply = self.replies.pop(0) if self.replies else {"rewards": [len(each["text"]) for each in body["answers"]]}
        if reply == "authorization":
            reply = {"rewards": [len(self.headers["Authorization"] or "")]}
        if reply == "drip":  # a byte now and then, without end
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            with contextlib.suppress(OSError):  # which ends it
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            return
        if reply == "gigabytes":
            self.send_response(200)
            self.send_header("Content-Length", str(2**40))
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b" " * 2**16)
            return
        if isinstance(reply, int):
            self.send_response(reply)
            self.send_header("Location", "file:///etc/passwd")
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"not today")
            return
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(site, monkeypatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "replies", [])
    monkeypatch.setattr(Handler, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{served.server_port}"
        site(addresses=(f"{address}/v1",))
        yield address
        served.shutdown()


def http(server: str, **settings: object) -> Rewards:
    return build_rewards([{"name": "http", "url": f"{server}/v1/score", **settings}], "text")


def test_a_server_judges_all_at_once_and_is_told_no_more_than_its_columns(server):
    rewards = http(server, columns=["tests"])
    assert rewards.score(1, answers("a", "abc", tests="t", secret="s"))[1].tolist() == [1, 3]
    assert [each["row"] for each in Handler.seen[0]["answers"]] == [{"tests": "t"}] * 2 and len(Handler.seen) == 1


def test_a_server_that_is_down_for_a_while_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(web, "FIRST_WAIT", 0.05)
    Handler.replies[:] = [503, 429]
    assert http(server).score(1, answers("abc"))[1].tolist() == [3]
    assert len(Handler.seen) == 3


def test_a_server_that_stays_away_ends_the_run_as_lost_data_does(server):
    Handler.replies[:] = [500] * 9
    message = r"objective.rewards\[0\] \(http\): url: .* has not answered for 0.01 minutes .HTTP 500.*start the run again"
    with pytest.raises(SourceLost, match=message):
        http(server, retry_minutes=0.01).score(1, answers("abc"))
    Handler.replies[:] = ["drip"]
    with pytest.raises(SourceLost, match="no reply in 0.3 seconds"):
        http(server, retry_minutes=0, seconds=0.3).score(1, answers("abc"))
    deadline = time.monotonic() + 20
    while (asking := [each for each in threading.enumerate() if each.name == "reward"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not asking, "nobody goes on reading"


@pytest.mark.parametrize(("reply", "why", "asked"), [
    (404, "answers with HTTP 404: not today", 1), (302, "answers with HTTP 302", 1),
    ("gigabytes", "said more than 16,777,216 bytes; asked 3 times", 3),
    ({"rewards": "1"}, "gave '1', not a number for each of 1; asked 3 times", 3),
    ({"rewards": [1, 2]}, "gave 2 numbers for 1; asked 3 times", 3), ({"scores": [1]}, "said b'.*', and not .*rewards", 3),
])  # fmt: skip
def test_a_server_that_answers_otherwise_is_named(server, reply, why, asked):
    Handler.replies[:] = [reply] * 3
    with pytest.raises(UserError, match=why):
        http(server).score(1, answers("abc"))
    assert len(Handler.seen) == asked


# --- what the site allows -----------------------------------------------------------------------------------------------


def test_another_address_than_the_sites_is_refused(server):
    others = [f"{server}/v2/score", f"{server}/v1evil", f"{server}/v1/../v2", f"{server}/v1/%2e%2e/v2", "file:///etc/passwd",
              f"https{server[4:]}/v1/score", "http://127.0.0.1:1/v1/score", "ftp://127.0.0.1/v1", f"{server}/v1\\..\\v2"]
    message = r"objective.rewards\[0\].url: .*(is none that this site allows|is no plain address)"
    for url in others:
        with pytest.raises(UserError, match=message):
            build_rewards([{"name": "http", "url": url}], "text")
    with pytest.raises(UserError, match=r"rewards\[0\].url: http://.*/v1/score\?token=\*\*\*: its token was left out"):
        build_rewards([{"name": "http", "url": f"{server}/v1/score?token=***"}], "text")
    with pytest.raises(UserError, match=r"rewards\[0\].url=http://\*\*\*@evil/v1: an address must not hold a user's name"):
        build_rewards([{"name": "http", "url": f"{server}\\@evil/v1"}], "text")


def test_a_token_in_an_address_is_not_repeated(server, caplog):
    url = f"{server}/v1/score?token=PlantedJudgeToken123"
    Handler.replies[:] = [{"scores": [1]}] * 3 + [500]
    for failure in (UserError, SourceLost):
        with pytest.raises(failure) as found:
            http(server, url=url, retry_minutes=0).score(1, answers("abc"))
        assert "Planted" not in caplog.text + str(found.value) and "token=***" in str(found.value)
    config = genscale.config("reward", {"objective.rewards": [{"name": "http", "url": url}]})
    (written,) = config_dict(config)["objective"]["rewards"]  # what config.yaml, checkpoints and trackers are given
    assert written["url"] == f"{server}/v1/score?token=***"


def test_a_name_and_a_password_are_those_of_netrc(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password it's-secret\n")
    (tmp_path / "netrc").chmod(0o600)
    Handler.replies[:] = ["authorization"]
    sent = "Basic " + base64.b64encode(b"me:it's-secret").decode()
    assert http(server).score(1, answers("abc"))[1].tolist() == [len(sent)]


def test_a_program_that_the_site_does_not_name_or_others_may_write_is_refused(site, judge, tmp_path, monkeypatch):
    for name in ("/bin/sh", "judg", "../judge"):
        with pytest.raises(UserError, match=rf"rewards\[0\].program: '{name}' is none that this site allows \(.*judge\)"):
            judge(program=name)
    with pytest.raises(UserError, match=r"rewards\[0\].command: unknown key"):
        judge(command=["/bin/sh"])
    (tmp_path / "judge").chmod(0o757)
    with pytest.raises(UserError, match=r"rewards.programs.judge.command: .* may be written by others"):
        judge()
    (tmp_path / "judge").chmod(0o644)
    with pytest.raises(UserError, match="cannot be executed"):
        judge()
    (tmp_path / "judge").chmod(0o755)
    file = site(seconds="soon")
    with pytest.raises(UserError, match=r"site.yaml: rewards.programs.judge.seconds: must be a number, not soon"):
        judge()
    file.write_text("rewards: {programs: {judge: {command: [judge]}}}")
    with pytest.raises(UserError, match="'judge' is no absolute path"):
        judge()
    file.chmod(0o666)
    with pytest.raises(UserError, match="GENSCALE_SITE: .*site.yaml: may be written by others"):
        judge()
    monkeypatch.delenv("GENSCALE_SITE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # where a site.yaml lies, which is nobody's word
    with pytest.raises(UserError, match="there is no file of the site; see GENSCALE_SITE"):
        judge()


def test_the_sites_file_is_also_that_of_jobs(site):
    file = site()
    file.write_text("partition: gpu\n" + file.read_text())
    assert read_site(str(file)).partition == "gpu"
