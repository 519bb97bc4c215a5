"""Progress as a person or a log sees it, from real processes with a pipe or a terminal for stderr."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from genscale.tracking.progress import Progress, describe, figure

METRICS = "{'loss': 3.21449, 'learning_rate': 2.9e-4, 'grad_norm': 0.834, 'tokens_per_second': 12345.2, 'step_seconds': 1.0}"


def _on_pipe(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def _on_terminal(code: str, columns: int) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs)
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 4096):
            chunks.append(chunk)
    except OSError:  # how Linux reports the end of a terminal
        pass
    os.close(ours)
    assert process.wait() == 0
    return b"".join(chunks).decode()


def _loop(first: int, logged: str, body: str = "") -> str:
    return (
        "import time; from genscale.tracking import progress; from genscale.tracking.progress import Progress\n"
        f"bar = Progress(1000, {first}, 'tokens')\n"
        f"for step in {logged}:\n"
        f"    time.sleep(0.02); bar.update(step, {METRICS})\n"
        f"    {body or 'pass'}\n"
        "bar.close(); bar.close()\n"
    )


def test_a_log_gets_the_first_and_the_last_logged_step_and_not_all_between():
    lines = _on_pipe(_loop(0, "[10, 20, 30, 40]"))
    assert [line.split()[1] for line in lines] == ["10/1000", "40/1000"]
    shown = r"step 10/1000  loss 3.2145  lr 2.9e-04  grad 0.83  12,345 tokens/s  \d+:\d\d:\d\d left"
    assert re.fullmatch(shown, lines[0])
    assert [line.split()[1] for line in _on_pipe(_loop(0, "[990, 995, 1000]"))] == ["990/1000", "1000/1000"]


def test_a_log_gets_a_line_when_the_interval_has_passed():
    code = _loop(0, "[10, 20, 30, 40]", "time.sleep(1.2 if step == 20 else 0)")
    code = code.replace("bar =", "progress.LINE_SECONDS = 1\nbar =")
    assert [line.split()[1] for line in _on_pipe(code)] == ["10/1000", "30/1000", "40/1000"]


def test_time_left_is_reckoned_from_this_start_and_not_from_step_zero():
    # 500 steps were done before; 10 steps take 1 s, so 490 steps take about 49 s (and 1 s if the 500 counted).
    code = _loop(500, "[510]").replace("sleep(0.02)", "sleep(1.0)")
    minutes, seconds = re.search(r"0:(\d\d):(\d\d) left", _on_pipe(code)[0]).groups()
    assert 45 <= int(minutes) * 60 + int(seconds) <= 200  # a busy machine sleeps longer


def test_a_terminal_gets_a_bar_that_fits_and_lines_above_it():
    screen = _on_terminal(_loop(0, "[250, 500, 1000]", "bar.write(f'sample at {step}'); bar.update(step)"), 80)
    drawn = [piece for piece in re.split(r"[\r\n]+|\x1b\[A", screen) if piece.startswith("step")]
    assert max(map(len, drawn)) <= 80
    shown = r"step 1000/1000 \|█+\| loss 3.2145  lr 2.9e-04  12,345 tokens/s  00:00 left *"
    assert re.fullmatch(shown, drawn[-1]), drawn[-1]
    assert re.search(r"\rsample at 500\r?\n", screen)


def test_several_phases_are_named_with_three_digits_and_what_does_not_fit_is_left_out_from_the_end():
    metrics = {"learning_rate": 2e-4, "discriminator/loss": 1.31449, "discriminator/real": 0.7, "discriminator/grad_norm": 2.0,
               "generator/loss": 0.8215, "generator/grad_norm": 1.0, "validation_fd": 1234.5, "images_per_second": 12345.2}
    full = "discriminator 1.31  generator 0.822  fd 1,234  12,345 images/s  lr 2.0e-04"
    assert describe(metrics, "images") == full
    assert describe(metrics, "images", width=65) == "discriminator 1.31  generator 0.822  fd 1,234  12,345 images/s"
    assert describe(metrics, "images", width=46) == "discriminator 1.31  generator 0.822  fd 1,234"
    two_rates = {"generator/loss": None, "discriminator/loss": -3e-5, "learning_rate/a": 1e-4, "learning_rate/b": 4e-4}
    assert describe(two_rates, "images") == "discriminator -3e-05  lr 1.0e-04 4.0e-04"


def test_several_phases_on_a_terminal_fit_its_width():
    code = _loop(0, "[250, 500, 1000]").replace("'loss': 3.21449", "'discriminator/loss': 1.31, 'generator/loss': 0.82")
    screen = _on_terminal(code, 80)
    drawn = [piece for piece in re.split(r"[\r\n]+|\x1b\[A", screen) if piece.startswith("step")]
    shown = r"step 1000/1000 \|█+\| discriminator 1.31  generator 0.82  00:00 left *"
    assert max(map(len, drawn)) <= 80 and re.fullmatch(shown, drawn[-1]), drawn[-1]


def test_a_terminal_without_a_width_gets_lines():
    screen = _on_terminal(_loop(0, "[10, 1000]"), 0)
    assert [line.split()[1] for line in screen.splitlines()] == ["10/1000", "1000/1000"]


@pytest.mark.parametrize(("value", "words"), [
    (16, "16"), (123456, "123,456"), (16.0, "16.0000"), (2.34567, "2.3457"), (0.0, "0.0000"), (1.5e-5, "1.5e-05"),
    (float("inf"), "inf"), (1e300, "1e+300"),
])  # fmt: skip
def test_counts_are_whole_numbers_and_no_number_is_hidden(value, words):
    assert figure(value) == words


def test_what_is_left_of_the_longest_run_is_said() -> None:
    left = Progress(2**63 - 1)
    left._start -= 1000.0
    assert left._left(1).days > 10**6
