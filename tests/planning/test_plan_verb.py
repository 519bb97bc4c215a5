"""`genscale plan` as a user types it: real steps on tensors without storage, of runs that are small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.families import FAMILIES
from genscale.planning.account import Machine
from genscale.planning.finished import finished
from genscale.planning.plan import plan
from genscale.settings.parser import load_config

H100 = ("--gpu", "h100")


@pytest.mark.parametrize(("words", "message"), [
    (["--gpu", "h10"], "--gpu: there is no profile 'h10' (did you mean 'h100'?)"),
    ([], "--gpu: name the kind of device: "),
    ([*H100, "--gpus", 12], "--gpus: 12 are no whole number of nodes of 8; nearest that are: 8 or 16, or --gpus_per_node 6"),
    ([*H100, "--gpus", 8], "train.global_batch_size: 4 does not divide by 8 processes; nearest values that do: 8"),
    ([*H100, "--between_nodes", "fast"], "--between_nodes: 'fast' is no speed of a network; write 400Gb/s"),
    ([*H100, "--spare", "200%"], "--spare: must be a share of the memory below 100%, as 10%, not '200%'"),
    ([*H100, "--out", "x.json"], "--out: x.json has no effect without --calibrate"),
    ([*H100, "--serch"], "--serch: unknown setting"),
    (["--gpu", "v100", "--train.precision", "bf16"], "train.precision: bf16 is not supported by "),
    (["--gpu", "a100-40", "--train.precision", "fp8", "--parallel.compile", "true"],
     "train.precision: fp8 needs an NVIDIA GPU of the Hopper generation or newer"),
    ([*H100, "--gpus", 2, "--parallel.strategy", "single"], "parallel.strategy: single means one process"),
    ([*H100, "--gpus", 2, "--parallel.offload", "cpu"], "parallel.offload: cpu needs ZeRO, but the strategy is ddp"),
    ([*H100, "--model.from", "nobody/model"], "model.from: there is no folder nobody/model here, a run's or a model's, to "),
    ([*H100, "--json", "--explain", "time"], "--json: has no effect beside --explain; leave it out"),
    ([*H100, "--calibrate"], "--gpu: h100 has no effect beside --calibrate; leave it out"),
    (["--gpus", 2, "--measure", "nowhere"], "--gpus: 2 has no effect beside --measure; leave it out"),
    ([*H100, "--train.global_batch_size", 2**31 - 1], "train.micro_batch_size: 2,147,483,647 samples of 132 bytes are "),
    ([*H100, "--measure", "nowhere"], "--config: has no effect beside --measure"),
])  # fmt: skip
def test_mistakes_are_one_line(words, message, genscale, tiny_config):
    said = genscale("plan", "--config", tiny_config, *words).message()
    assert message in said


def test_a_family_that_cannot_be_planned_says_what_it_lacks(genscale, tiny_config, tmp_path):
    said = genscale("plan", *H100).message()
    assert said.startswith("--config: name the YAML file of the run")
    assert genscale("plan", "--measure", tmp_path).message().startswith(f"--measure: {tmp_path} is no run folder")


def test_a_run_is_planned_with_what_would_be_better(genscale, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("genscale.verbs.plan.LOOKING", 60.0)
    small = ("--model.layers", 1, "--train.global_batch_size", 2, "--train.precision", "bf16")  # few ways, all looked at
    done = genscale("plan", "--config", tiny_config, *H100, "--gpus", 2, *small, "--json", "--price", 2)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["fits"] and said["settings"]["strategy"] == "ddp" and said["whole"]["steps"] == 6
    assert said["whole"]["money"] == pytest.approx(2 * said["whole"]["gpu_hours"])
    assert sum(part["bytes"] for part in said["memory"]["parts"]) == said["memory"]["peak"]
    ways = said["choices"]["fitting"]
    assert {} in [each["changes"] for each in ways] and len(ways) > 1 and said["choices"]["left_out"] == 0
    assert not (tmp_path / "runs").exists()  # nothing is written, and no data is read


@pytest.mark.slow
def test_what_does_not_fit_ends_with_2_and_names_the_nearest_that_does(genscale, tiny_config, monkeypatch):
    shape = ("--data.sequence_length", 16384, "--model.positions", 16384, "--model.width", 512, "--train.global_batch_size", 64)
    monkeypatch.setattr("genscale.verbs.plan.LOOKING", 20.0)
    done = genscale("plan", "--config", tiny_config, "--gpu", "a100-40", *shape, "--train.precision", "bf16")
    assert done.code == 2 and done.out.splitlines()[1].endswith("DOES NOT FIT"), done.out + done.err
    best = done.out.partition("what fits, best first by speed:\n  ")[2].split("  ")[0]
    assert best.startswith("--train.micro_batch_size "), done.out


def test_what_is_wrong_with_one_of_several_stands_in_its_row(genscale, tiny_config):
    said = genscale("plan", tiny_config, "vae/digits", *H100, "--tokens", "1e6", "--train.precision", "bf16")
    assert said.code == 2 and "refused: --tokens: 1e+06, but family vae trains on no text" in said.out, said.err
    assert genscale("plan", tiny_config, tiny_config, "--config=gpt/demo", *H100).message() == \
        "--config=gpt/demo: stands beside 2 configs that are named; name all of them there"
    assert genscale("plan", tiny_config, tiny_config, *H100, "--search").message().startswith("--search: has no effect beside")


@pytest.mark.parametrize("manifest", ["{", '{"files": 3, "about": 5}', '{"files": {}, "about": {"world_size": "two"}}'])
def test_a_damaged_checkpoint_is_named(manifest, genscale, trained, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(trained, run)
    latest = max((run / "checkpoints").iterdir())
    (latest / "manifest.json").write_text(manifest)
    assert genscale("plan", "--measure", run, "--gpu", "cpu").message().startswith(f"--measure: {latest} is damaged (")


@pytest.mark.slow
def test_what_begins_from_a_run_is_planned_with_its_shape(genscale, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("genscale.verbs.plan.LOOKING", 0.0)
    vae = genscale("train", "--config", "vae/digits", "--run.dir", tmp_path, "--run.name", "vae", "--model.width", 4,
                   "--train.steps", 1, "--train.sample_every", 0)
    assert vae.code == 0, vae.err
    judge = json.dumps([{"name": "classifier", "run": str(tmp_path / "vae"), "label": "3"}])
    threes = genscale("plan", "--config", "reward/digits-threes", "--gpu", "a100", "--model.from", tmp_path / "vae",
                      f"--objective.rewards={judge}", "--json")
    assert threes.code == 0, threes.err
    alone = plan(load_config(FAMILIES, tmp_path / "vae" / "config.yaml"), Machine("a100", 1, 1)).step.parameters
    said = json.loads(threes.out)
    assert alone < said["parameters"] < alone + 700_000 and said["settings"]["micro_batch_size"] == 16

    words = ("--gpu", "a100", "--objective.tokens", 4, "--data.prompt_tokens", 8, "--json")
    tuned = genscale("plan", "--config", "reward/sums", *words, "--model.from", trained)
    assert tuned.code == 0, tuned.err
    gpt = finished(trained)
    assert json.loads(tuned.out)["parameters"] == 2 * plan(gpt.config, Machine("a100", 1, 1)).step.parameters


def test_configs_stand_side_by_side(genscale, tiny_config, tmp_path):
    refused = tmp_path / "refused.yaml"
    refused.write_text(tiny_config.read_text().replace("global_batch_size: 4", "global_batch_size: 5"))
    done = genscale("plan", tiny_config, refused, *H100, "--gpus", 2, "--tokens", "1e6", "--train.precision", "bf16")
    rows = done.out.splitlines()
    assert done.code == 2 and rows[1].split()[:2] == [str(tiny_config), "fits"], done.err
    assert "refused: train.global_batch_size: 5 does not divide by 2 processes" in rows[2]


def test_a_finished_run_is_held_against_its_plan(genscale, trained):
    """The bytes of its checkpoint to the byte; on a CPU the time of a step is only shown beside."""
    run = finished(trained)
    assert (run.processes, run.device, run.config.parallel.strategy) == (1, "cpu", "single") and run.peak_bytes is None
    planned = plan(load_config(FAMILIES, trained / "config.yaml"), Machine("h100", 1, 1))
    assert planned.step.memory.checkpoint_bytes == run.checkpoint_bytes
    done = genscale("plan", "--measure", trained, "--gpu", "h100")
    rows = {line[:22].strip(): line[22:].split() for line in done.out.splitlines()}
    assert done.code == 0 and rows["checkpoint (MiB)"][2] == "+0.0%", done.out + done.err
    assert rows["peak memory a GPU (GiB)"[:22]][-3:-1] == ["not", "logged"]


def test_a_checkpoint_says_on_what_it_was_made(trained):
    about = Checkpoint(next(Path(trained, "checkpoints").iterdir())).manifest()["about"]
    assert about["device"] == "cpu" and about["processes_per_node"] == 1 and "peak_memory_bytes" not in about
