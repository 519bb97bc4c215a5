"""What strangers have named and said reaches the terminal as characters to read, not to obey."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from tqdm import tqdm

from genscale import cli
from genscale.cluster import job_status
from genscale.cluster.lives import tell
from genscale.data.worker_logs import Logs
from genscale.errors import UserError
from genscale.families.gpt import sampling as samplers
from genscale.printable import printable, printable_lines
from genscale.tracking.run_logging import setup_logging

EVIL = "a\x1b[2J\x1b]0;owned\x07\x9b31m\rb\u202etxt.exe\u2066\u2028c\x7f\udcff"
LOGGED = EVIL.removesuffix("\udcff")
"""pytest-xdist sends what a test logs from process to process as UTF-8."""
READABLE = ("日本語のデータ", "مرحبا بالعالم", "שָׁלוֹם", "नमस्ते", "é e\u0301", "👩\u200d🚀🏴\U000e0067\U000e007f",
            "a\u200fb")


def steers(text: str, allowed: str = "\n\t") -> list[str]:
    """Characters in it that a terminal would obey, by Unicode's own classes."""
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return [char for char in text if char not in allowed and (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
                                                              or unicodedata.bidirectional(char) in turning)]


def test_every_character_that_steers_is_shown_and_every_other_is_kept() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert not steers(printable_lines(every)) and not steers(printable(every), "")
    lost = {char for char in every if printable_lines(char) != char}
    assert lost - set("\ufff9\ufffa\ufffb") == set(steers(every))
    assert printable(EVIL) == r"a\x1b[2J\x1b]0;owned\x07\x9b31m\rb\u202etxt.exe\u2066\u2028c\x7f\udcff"
    for text in READABLE:
        assert printable(text) == text


def test_errors_logs_and_events_are_printable(tmp_path, capsys) -> None:
    assert not steers(str(UserError(f"data.source={EVIL}: no")), "")
    setup_logging(tmp_path, 0)
    logging.getLogger("genscale").warning("left out %s", f"x\nERROR genscale: forged {LOGGED}")
    logging.getLogger("genscale.data.folders").warning("left out %s", f"x\nERROR genscale: forged {LOGGED}")
    logging.getLogger("urllib3").info("answer %s", LOGGED)
    try:
        raise ValueError(LOGGED)
    except ValueError:
        logging.getLogger("genscale").exception("failed")
    tell(_folder(tmp_path / "jobs").parent, "7", f"word\nforged {EVIL}")
    logged = (tmp_path / "logs" / "rank-00000.log").read_text(encoding="utf-8")
    captured = capsys.readouterr()
    for text in (logged, captured.err, captured.out, (tmp_path / "jobs" / "events.log").read_text()):
        assert text.count("owned") and not steers(text)
        assert not [line for line in text.splitlines() if line.startswith(("ERROR", "forged"))]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_warnings_of_loader_workers_are_printable() -> None:
    said = io.StringIO()
    with redirect_stderr(said):
        ours = logging.getLogger("genscale")
        before = list(ours.handlers)
        Logs((), console=True).follow()
        ours.warning("left out %s\nx", LOGGED)
        for handler in set(ours.handlers) - set(before):
            ours.removeHandler(handler)
    assert "warning: left out a\\x1b" in said.getvalue() and not steers(said.getvalue())


def test_tables_of_a_strangers_folder_are_printable(trained, genscale, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    manifest = next((run / "checkpoints").glob("step-*")) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["about"] |= {"strategy": f"{EVIL}\nforged", "position": EVIL, "commit": EVIL}
    manifest.write_text(json.dumps(content))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"{json.dumps(EVIL[:-1])}: {json.dumps(EVIL[:-1])}\n")
    for words in (["checkpoint", "list", run], ["compare", trained, run], ["checkpoint", "list", tmp_path / EVIL[:-1]]):
        done = genscale(*words)
        assert "owned" in done.out + done.err and not steers(done.out + done.err), words
        assert not [line for line in done.out.splitlines() if line.startswith("forged")]


def test_rows_of_slurm_status_are_lines() -> None:
    row = job_status.Row(Path(f"runs/{EVIL}"), "7", "ended", 1, 2, 3, None, None, None, None, f"lost\nforged {EVIL}")
    table = job_status.table([row])
    assert len(table.splitlines()) == 2 and not steers(table)


def test_a_traceback_of_ours_is_printable(genscale_process, tmp_path) -> None:
    """The interpreter's own, at the end of the process."""
    script = tmp_path / "script.py"
    script.write_text("from genscale import cli\n"
                      "cli.main = lambda arguments: {}['\\x1b[2J' + arguments[0]] if 0 else exec('raise ValueError(chr(27))')\n"
                      "cli.start(['x'])\n")
    done = genscale_process(command=(sys.executable, str(script)))
    assert done.code == 1 and "ValueError: \\x1b" in done.err and not steers(done.err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_models_text_is_shown_on_a_terminal_and_kept_in_a_file(trained, monkeypatch, kind) -> None:
    piece = type("Piece", (), {"text": 0, "words": "so\x1b[2J\n\tit goes", "tokens": 3})
    monkeypatch.setattr(samplers, "stream_texts", lambda *_, **__: iter([piece]))
    out, before = kind(), sys.stdout
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        assert cli.main(["sample", str(trained), "--tokens", "3"]) == 0
    assert sys.stdout is before
    assert out.getvalue() == ("so\\x1b[2J\n\tit goes\n" if kind is Terminal else "so\x1b[2J\n\tit goes\n")


def test_progress_bars_still_move(monkeypatch) -> None:
    """Two of them, with a line above: the same characters as without."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # a thread that paints them now and then

    def bars(file: object) -> None:
        tqdm._instances.clear()  # bars that another test left would take the first place
        with tqdm(total=2, file=file, ncols=40, mininterval=0, bar_format="{desc}|{bar}|") as outer, \
                tqdm(total=2, file=file, ncols=40, position=1, leave=False, mininterval=0,
                     bar_format="{desc}|{bar}|") as inner:
            tqdm.write("above", file=file)
            inner.update(1)
            outer.update(1)

    plain, shown = io.StringIO(), io.StringIO()
    bars(plain)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli.show_printable()
    bars(sys.stderr)
    assert shown.getvalue() == plain.getvalue() and "\x1b[A" in shown.getvalue()
