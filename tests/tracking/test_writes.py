"""A disk that stays full is mentioned once, and what can wait is written when there is room again."""

from __future__ import annotations

import contextlib
from pathlib import Path

from genscale.data.text.settings import TextDataSettings
from genscale.families.gpt.settings import GPTSettings
from genscale.settings.config import Config, TrackingSettings
from genscale.tracking.metrics_file import MetricsFile, read_metrics
from genscale.tracking.run_record import RunRecord
from genscale.tracking.writes import Writes


def test_a_full_disk_is_mentioned_once_and_no_line_is_lost(small_disk):
    disk = small_disk("1m")
    metrics, warnings = MetricsFile(disk / "metrics.jsonl"), []
    writes = Writes(warnings.append)

    def log(step: int) -> None:
        writes.attempt("metrics.jsonl", lambda: metrics.append(step, {"loss": step / 3, "note": "x" * 1000}))

    log(1)
    filler = Path(disk / "filler")
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    for step in range(2, 40):
        log(step)
    assert len(warnings) == 1 and warnings[0].startswith("metrics.jsonl could not be written: No space left on device")
    filler.unlink()
    log(40)
    assert len(warnings) == 2 and "metrics.jsonl can be written again, after 3" in warnings[1], warnings
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(disk / "metrics.jsonl")] == [(n, n / 3) for n in range(1, 41)]


def test_each_file_is_mentioned(tmp_path):
    warnings: list[str] = []
    writes = Writes(warnings.append)
    for name in ("a", "b", "a"):
        writes.attempt(name, lambda name=name: (tmp_path / "absent" / name).write_text(""))
    assert [warning.split()[0] for warning in warnings] == ["a", "b"]


def test_what_a_killed_life_was_drawing_is_gone_at_the_end(tmp_path):
    """On a node that was cut off an earlier life may draw, and be killed, while the next one trains. What is not ours stays."""
    (tmp_path / "plots" / ".new-1ma5rocj").mkdir(parents=True)
    (tmp_path / "plots" / ".new-1ma5rocj" / "loss.png").write_bytes(b"half")
    (tmp_path / "samples").mkdir()
    for name in (".step-00000010.txt-0123456789ab", ".keep", "step-00000010.txt"):
        (tmp_path / "samples" / name).write_text("")
    config = Config(model=GPTSettings(), data=TextDataSettings(), tracking=TrackingSettings(wandb="disabled"))
    RunRecord(tmp_path, config, {}, "tokens", 0, Writes(print)).close(failed=False, loss_unit="nats")
    left = sorted(str(path.relative_to(tmp_path)) for folder in ("plots", "samples") for path in (tmp_path / folder).iterdir())
    assert [name for name in left if name != "plots/loss.png"] == ["samples/.keep", "samples/step-00000010.txt"]
