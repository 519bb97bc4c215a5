"""metrics.jsonl must survive kills, full disks and resumes without losing or repeating a step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from genscale.errors import UserError
from genscale.tracking.metrics_file import MetricsFile, read_metrics, read_some_metrics


def test_floats_read_back_bit_for_bit(tmp_path):
    values = {"third": 1 / 3, "tiny": 5e-324, "fp32": float(np.float32(0.1)), "huge": 1.7976931348623157e308}
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(7, values | {"tensor": torch.tensor(0.1), "tokens": 2**60 + 1, "digest": "ab"})
    metrics.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record == {"step": 7} | values | {"tensor": float(np.float32(0.1)), "tokens": 2**60 + 1, "digest": "ab"}


def test_nan_and_infinity_are_null_in_strict_json(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(1, {"loss": float("nan"), "grad_norm": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None}


def test_truncate_after_drops_later_steps_and_a_torn_line_then_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = ['{"step": 10, "loss": 0.30000000000000004}', '{"step": 20, "loss": 2}', '{"step": 20, "validation_loss": 3}']
    path.write_text("\n".join([*whole, '{"step": 30, "loss": 1}', '{"step": 40, "lo']))
    metrics = MetricsFile(path)
    metrics.truncate_after(20)
    assert path.read_text().splitlines() == whole
    metrics.append(30, {"loss": 9.0})
    records = [(record["step"], record.get("loss")) for record in read_metrics(path)]
    assert records == [(10, 0.1 + 0.2), (20, 2), (20, None), (30, 9.0)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_appending_after_a_torn_line_keeps_lines_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "l')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    MetricsFile(path).append(2, {"loss": 1.5})
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_metrics(path)


def test_what_is_no_file_of_lines_is_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**36)  # of holes
    for read, name, words in ((read_metrics, "folder", "cannot be read"), (read_metrics, "huge", "67,108,864 bytes in line 1"),
                              (MetricsFile, "huge", "67,108,864 bytes in line 1")):
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)


def test_a_killed_process_leaves_every_line_it_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from genscale.tracking.metrics_file import MetricsFile; m = MetricsFile(sys.argv[1])\n"
        "for step in range(500): m.append(step, {'loss': step / 3})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert read_metrics(path) == [{"step": step, "loss": step / 3} for step in range(500)]


def test_a_full_disk_raises_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    # A limit on the file's size fails a write half way, as a full disk does.
    code = (
        "import resource, signal, sys; from genscale.tracking.metrics_file import MetricsFile\n"
        "m = MetricsFile(sys.argv[1]); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    for step in range(500): m.append(step, {'loss': 1.0})\n"
        "except OSError as error: print(error.errno)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "m.append(999, {'loss': 2.0})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip().isdigit()
    records = read_metrics(path)
    assert [record["step"] for record in records] == [*range(len(records) - 1), 999]  # those kept back, too


def test_what_a_resume_drops_is_what_it_says_whatever_the_order(tmp_path):
    """And a torn end goes with it; what is damaged in the middle is named, and the file left as it was."""
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 2}', '{"step": 5, "loss": 2}', '{"loss": 1, "step": 2}', '{"step": 2, "validation_loss": 1}',
             '{"step": 3, "loss": 2}']
    path.write_text("\n".join(lines))  # the last without its end, but whole
    metrics = MetricsFile(path)
    assert path.read_text() == "\n".join(lines) + "\n"
    metrics.drop(lambda record: "loss" in record, since=3)
    assert path.read_text().splitlines() == [lines[0], lines[2], lines[3]]
    metrics.append(3, {"loss": 1.0})
    metrics.truncate_after(1)
    metrics.append(2, {"loss": 3.0})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 20 + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        MetricsFile(path).truncate_after(1)
    assert path.read_bytes().endswith(b'{"step": 3}\n')


def test_lines_that_a_full_disk_keeps_back_are_dropped_like_the_others(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(1, {"loss": 1.0})
    metrics._waiting = b'{"step": 2, "loss": 1.0}\n{"step": 3, "loss": 1.0}\n'
    metrics.truncate_after(2)
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_some_of_many_lines_are_spread_over_all_with_the_best_validation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps({"step": step, "loss": step / 2} | ({"second/loss": 1.0} if step % 2 else {})) + "\n")
            file.write(json.dumps({"step": step, "validation_loss": 1e-9 if step == 777 else 2.0 + step}) + "\n")
        file.write('{"step": 20001, "lo')
    some = read_some_metrics(path, 500)
    training, validation = ([record for record in some if key in record] for key in ("loss", "validation_loss"))
    assert 500 <= len(training) <= 502 and 500 <= len(validation) <= 503
    assert 150 < sum("second/loss" in record for record in training) < 350  # logged every other step
    for records in (training, validation):
        steps = [record["step"] for record in records]
        assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 20_000
        assert max(np.diff(steps)) <= 80
    assert min(record["validation_loss"] for record in validation) == 1e-9
    assert read_some_metrics(path, 10**5) == read_metrics(path)


@pytest.mark.slow
def test_a_million_lines_are_drawn_and_gone_on_from_in_bounded_time_and_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = {"learning_rate": 1 / 3, "loss": 0.0, "grad_norm": 1 / 7, "tokens": 2432, "tokens_per_second": 1e5 / 3,
            "step_seconds": 1 / 300, "data_wait_seconds": 1 / 3000, "data_wait_share": 0.1 / 3, "data_digest": 2**60}
    end = json.dumps(line)[1:]
    with path.open("w") as file:
        file.writelines(f'{{"step": {step}, {end}\n' for step in range(1, 1_000_001))
    code = (
        "import re, sys, time; from genscale.tracking.metrics_file import MetricsFile\n"
        "from genscale.tracking.plots import plot_losses\n"
        "def spent(since=0.0): print(time.process_time() - since); return time.process_time()\n"
        "now = spent(); MetricsFile(sys.argv[1]).truncate_after(999_000)\n"
        "now = spent(now); plot_losses(sys.argv[1], sys.argv[1] + '.png', 'run')\n"
        # Not ru_maxrss, in which what the parent held when it forked counts too.
        "now = spent(now); print(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    _, resumed, drawn, mebibytes = map(float, done.stdout.split())
    assert resumed < 5 and drawn < 5 and mebibytes < 500
    with path.open("rb") as file:
        file.seek(-400, os.SEEK_END)
        assert file.read().count(b'{"step": 999000, ') == 1
