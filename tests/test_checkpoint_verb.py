"""genscale checkpoint: what it lists of real runs, and the one file that consolidate makes."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.code_version import ROOT, commit
from genscale.checkpoint.provenance import position_in_words
from genscale.testing.runs import Run

SETTINGS = {"train.steps": 10, "train.checkpoint_every": 2, "train.evaluate_every": 4, "train.checkpoint_keep": 1,
            "train.checkpoint_keep_every": 8, "train.checkpoint_best": "fd", "train.ema_half_life": 100,
            "train.global_batch_size": 8, "data.source": "digits", "data.size": 16, "data.channels": 1,
            "data.validation_images": 80, "model.width": 8, "tracking.wandb": "disabled",
            "train.precision": "fp32"}  # fmt: skip


def trained_gan(genscale, folder: Path, **changes) -> Path:
    """A DCGAN on digits with an average of its generator, that keeps one checkpoint, the best by fd, and every 8th step's."""
    settings = {"run.dir": folder, "run.name": "gan", **SETTINGS, **changes}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    done = genscale("train", "--model.family", "dcgan", *words)
    assert done.code == 0, done.err
    return folder / "gan"


@pytest.fixture(scope="module")
def gan_run(genscale, tmp_path_factory) -> Path:
    return trained_gan(genscale, tmp_path_factory.mktemp("gan"))


def scores_of(run: Path, metric: str) -> dict[int, float]:
    """By step, from the run's own metrics."""
    return {line["step"]: line[f"validation_{metric}"] for line in Run(run).metrics() if f"validation_{metric}" in line}


def listed(genscale, path: Path) -> list[dict]:
    done = genscale("checkpoint", "list", path, "--json")
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_the_latest_the_best_and_every_eighth_are_kept_and_listed(genscale, gan_run):
    scores = scores_of(gan_run, "fd")
    best = min(scores, key=scores.get)
    rows = listed(genscale, gan_run)
    assert [row["step"] for row in rows] == sorted({best, 8, 10})
    assert [row["step"] for row in rows if row["best"]] == [best] and [row["step"] for row in rows if row["kept"]] == [8]
    assert all(row["problem"] is None and row["strategy"] == "single" and row["world_size"] == 1 for row in rows)
    assert rows[-1]["position"] == "epoch 1, 80 of 1.62 k samples" and rows[-1]["commit"] == commit()
    assert rows[-1]["versions"]["torch"] == torch.__version__
    assert 0 <= rows[-1]["age_seconds"] < 3000 and datetime.fromisoformat(rows[-1]["time"]).tzinfo == UTC
    assert rows[-1]["bytes"] == sum(f.stat().st_size for f in (gan_run / "checkpoints/step-00000010").rglob("*") if f.is_file())


def test_of_some_metrics_the_highest_is_the_best(genscale, tmp_path):
    run = trained_gan(genscale, tmp_path, **{"train.checkpoint_best": "diversity", "train.evaluate_every": 2})
    scores = scores_of(run, "diversity")
    best = max(scores, key=scores.get)
    assert scores[best] > min(scores.values())
    assert [row["step"] for row in listed(genscale, run) if row["best"]] == [best]


def test_the_table_has_columns_and_knows_no_time_zone(genscale, gan_run, monkeypatch):
    ages = []
    for zone in ("UTC", "Pacific/Kiritimati"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        head, *rows = genscale("checkpoint", "list", gan_run).out.splitlines()
        assert head.split() == ["CHECKPOINT", "SIZE", "AGE", "POSITION", "KEPT", "AS", "MADE", "BY", "STATE"]
        made = f"1 x single, torch {torch.__version__}, commit {commit()[:8]}"
        assert all(row[head.index("STATE"):] == "valid" for row in rows)
        assert all(row[head.index("MADE BY"):].startswith(made) for row in rows)
        assert all(row[head.index("POSITION"):].startswith("epoch 1, ") for row in rows)
        ages.append([row["age_seconds"] for row in listed(genscale, gan_run)])
    monkeypatch.undo()
    time.tzset()
    assert ages[0] == pytest.approx(ages[1], abs=300)


def test_consolidate_writes_the_average_or_the_weights_of_the_step(genscale, gan_run, tmp_path):
    last = Checkpoint(gan_run / "checkpoints" / "step-00000010")
    for live, kind in ((["--live"], "networks"), ([], "averages")):
        out = tmp_path / f"{kind}.safetensors"
        done = genscale("checkpoint", "consolidate", gan_run, "--network", "generator", "--out", out, *live)
        assert done.code == 0 and done.out == f"{out}\n", done.err
        made, read = load_file(out), last.tensors(kind, "generator")
        assert sorted(made) == read.keys()
        assert all(torch.equal(made[key], read(key)) and made[key].dtype == read(key).dtype for key in made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["averages.safetensors", "networks.safetensors"]


@pytest.mark.parametrize(("arguments", "words"), [
    ([], ["--network", "discriminator, generator"]),
    (["--network", "genrator"], ["genrator", "discriminator, generator", "'generator'"]),
    (["--network", "generator", "--out", "there"], ["--out", "there already"]),
    (["--network", "generator", "--out", "absent/model.safetensors"], ["--out", "absent", "No such file"]),
])  # fmt: skip
def test_consolidate_refuses(arguments, words, genscale, gan_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("precious")
    options = arguments if "--out" in arguments else [*arguments, "--out", "model.safetensors"]
    message = genscale("checkpoint", "consolidate", gan_run, *options).message()
    assert all(word in message for word in words), message
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "precious"


def test_consolidate_writes_through_no_link(genscale, trained, tmp_path):
    """Folders that all may write to: neither the file itself, nor one that it is written to first."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").symlink_to(tmp_path / "new")
    (tmp_path / f".model.partial-{os.getpid()}").symlink_to(tmp_path / "precious")
    assert "path: '' is empty" in genscale("checkpoint", "list", "").message()
    assert "is there already" in genscale("checkpoint", "consolidate", trained, "--out", tmp_path / "out").message()
    assert genscale("checkpoint", "consolidate", trained, "--out", tmp_path / "model").code == 0
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "new").exists()


def test_consolidate_refuses_a_damaged_checkpoint(genscale, trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "checkpoints" / "step-00000006" / "networks" / "gpt.safetensors").write_bytes(b"")
    message = genscale("checkpoint", "consolidate", run, "--out", tmp_path / "model.safetensors").message()
    assert "damaged: networks/gpt.safetensors has 0 bytes" in message


def test_a_metric_that_no_evaluation_has(genscale, tiny_config, tiny_run, logged_steps):
    message = genscale("train", "--config", tiny_config, "--train.checkpoint_best", "perplexiti").message_of_run()
    for word in ("train.checkpoint_best", "'perplexiti'", "bits_per_byte, loss, perplexity", "did you mean 'perplexity'?"):
        assert word in message
    assert logged_steps(tiny_run) == []


@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [1, 2, 3, 4, 5, 6]), (1000, [6])])
def test_checkpoints_by_the_clock(minutes, steps, genscale, tiny_config, tiny_run, trained):
    done = genscale("train", "--config", tiny_config, "--train.checkpoint_every", 0, "--train.checkpoint_keep", 9,
                    "--train.checkpoint_minutes", minutes)
    assert done.code == 0, done.err
    assert [row["step"] for row in listed(genscale, tiny_run)] == steps
    last = Path("checkpoints") / "step-00000006"
    assert Checkpoint(tiny_run / last).digest() == Checkpoint(trained / last).digest()
    held_up = [line["step"] for line in Run(tiny_run).metrics() if line.get("checkpoint_hold_up_seconds", 0) > 0]
    assert held_up == [step + 1 for step in steps[:-1]], "each is told of on the next line of metrics"


@pytest.mark.parametrize(("samples", "epoch", "words"), [
    (33_400_000, 20_000_000, "epoch 2, 13.4 M of 20 M samples"), (13_400_000, None, "13.4 M samples"),
    (0, 100, "epoch 1, 0 of 100 samples"), (100, 100, "epoch 1, 100 of 100 samples"), (101, 100, "epoch 2, 1 of 100 samples"),
    (999, None, "999 samples"), (2_500_000_000, None, "2.5 G samples")])
def test_the_place_in_the_data_in_words(samples, epoch, words):
    assert position_in_words(samples, epoch) == words


def test_the_commit_is_git_s_own(tmp_path):
    assert (commit() is None) == (not (ROOT / ".git").exists())
    if commit():
        assert len(commit().removesuffix("-dirty")) == 40
