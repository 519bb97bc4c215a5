"""Whether genscale computes the same, waits for nothing, resumes exactly and is fast on the GPU of this machine, in 8 minutes.

    python benchmarks/gpu_acceptance.py --out benchmarks/results/gpu-acceptance.json
    python benchmarks/gpu_acceptance.py --device cpu --toy    # tries the program itself, without a GPU

It takes torch, accelerate, and what reads settings (jsonargparse, docstring-parser, psutil, PyYAML); fp8 takes torchao and is a
failure without it. Sections: parity with fp32 on the CPU (ten networks, fp32 and bf16); no step waits for the device
(`torch.cuda.set_sync_debug_mode`); resume in bits, with a save during training, plain and under run.deterministic; speed. The
JSON is written anew after each verdict, so that a run cut short leaves what it has found. Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic runs, before CUDA starts
if "cpu" in sys.argv:
    os.environ["ACCELERATE_USE_CPU"] = "true"

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.parallel.determinism import deterministic
from gpu_networks import SMALL, small
from gpu_speed import AIMS, SPEEDS, measure
from report import circumstances

import torch

LIMITS = {"fp32": 2e-4, "bf16": 6e-2}
"""Largest relative difference of a loss to fp32 on the CPU; TF32 would show as 1e-3. Norms may differ five times as much."""
RESUMED = ("gpt2", "qwen3, window, documents, dropout", "qwen3, window, documents, compiled", "llama, muon", "dcgan",
           "vae, bernoulli")
SPEED_SECONDS = 150


class Verdicts:
    """What was found so far, printed and kept as JSON."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.began, self.found = out, time.monotonic(), []
        self.about = circumstances(("torch", "accelerate", "transformers", "torchao", "triton"))

    def say(self, verdict: str, what: str, **facts: Any) -> None:
        seconds = round(time.monotonic() - self.began, 1)
        self.found.append({"verdict": verdict, "what": what, "at_seconds": seconds, **facts})
        print(f"{seconds:6.1f} s  {verdict:4}  {what}  {'  '.join(f'{name} {value}' for name, value in facts.items())}",
              flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps({**self.about, "verdicts": self.found}, indent=1) + "\n")

    @contextlib.contextmanager
    def failure_of(self, what: str) -> Iterator[None]:
        """An error inside is a verdict, and the next check goes on."""
        try:
            yield
        except Exception as error:  # of any library
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "genscale" in frame.filename]
            where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:]))
            self.say("FAIL", what, error=f"{type(error).__name__}: {str(error)[:300]}", where=where)


def apart(ours: list[dict[str, float]], theirs: list[dict[str, float]], word: str) -> float:
    """Largest relative difference of the metrics with this word in their names; of small ones against 0.05."""
    return max((abs(one[name] - other[name]) / max(0.05, abs(other[name])) for one, other in zip(ours, theirs, strict=True)
                for name in other if word in name), default=0.0)


def parity(verdicts: Verdicts, toy: bool) -> None:
    """The same three steps here and in fp32 on the CPU."""
    words = ("loss", "grad_norm")
    for name in SMALL:
        plain = small(name, toy, precision="fp32", device="cpu", compile=False)
        plain.step(3)
        expected = plain.metrics(words)
        for precision, limit in LIMITS.items():
            with verdicts.failure_of(f"parity {name} {precision}"):
                run = small(name, toy, precision=precision)
                run.step(3)
                found = run.metrics(words)
                # In bf16 a GAN's updates enlarge rounding: the first step is judged, the later ones are shown.
                judged = 3 if precision == "fp32" else 1
                loss, norm = (apart(found[:judged], expected[:judged], word) for word in words)
                later = apart(found[judged:], expected[judged:], "loss")
                good = loss <= limit and norm <= 5 * limit
                verdicts.say("PASS" if good else "FAIL", f"parity {name} {precision}", loss=f"{loss:.1e}", norm=f"{norm:.1e}",
                             later_losses=f"{later:.1e}", limit=limit)


def waits(verdicts: Verdicts, toy: bool) -> None:
    """Two steps in which nothing may wait for the device."""
    for name in SMALL:
        with verdicts.failure_of(f"waits {name}"):
            run = small(name, toy)
            run.step(3)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                run.step(2)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.set_sync_debug_mode("default")
            verdicts.say("PASS", f"waits {name}: none in two steps")


def resume(verdicts: Verdicts, toy: bool) -> None:
    """Two equal runs, and one that goes on from a checkpoint of the second, which was written while that went on."""
    for name in RESUMED:
        for wanted in (False, True):
            what = f"resume {name}, run.deterministic {str(wanted).lower()}"
            with verdicts.failure_of(what), deterministic(wanted), tempfile.TemporaryDirectory() as folder:
                first, second = small(name, toy), small(name, toy)
                first.step(6)
                second.step(3)
                kept, saver = second.state(), second.save(Path(folder))
                second.step(3)
                assert saver.settle(), "the checkpoint was not written"
                third = small(name, toy, checkpoint=Checkpoint(Path(folder) / "step-00000003"))
                is_of_its_step = same(kept, third.state())
                third.batches.batch = third.steps_done = 3
                third.step(3)
                alike, resumed = same(first.state(), second.state()), same(second.state(), third.state())
                good = is_of_its_step and ((alike and resumed) or not wanted)
                verdicts.say("PASS" if good else "FAIL", what, saved_state_is_of_its_step=is_of_its_step,
                             two_runs_equal_bits=alike, resumed_equals_undisturbed=resumed)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def speed(verdicts: Verdicts, budget: float, words: list[str], toy: bool) -> None:
    """Each in a process of its own, what matters most first, as long as there is time."""
    for name in SPEEDS:
        what, left = f"speed {name}", budget - (time.monotonic() - verdicts.began)
        if left < 25:
            verdicts.say("INFO", f"{what}: no time left")
            continue
        limit = min(left - 5, SPEED_SECONDS)
        try:
            done = subprocess.run([sys.executable, __file__, *words, "--measure", name], capture_output=True, text=True,
                                  timeout=limit)
        except subprocess.TimeoutExpired:
            if limit < SPEED_SECONDS:
                verdicts.say("INFO", f"{what}: not measured in the {limit:.0f} s that were left")
            else:
                verdicts.say("FAIL", what, error=f"over {limit:.0f} s")
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            verdicts.say("FAIL", what, error=" | ".join(done.stderr.strip().splitlines()[-4:])[-600:])
            continue
        facts = json.loads(lines[-1].removeprefix("RESULT "))
        metric, least = AIMS.get(name, ("", 0.0))
        verdict = "INFO" if toy or not metric else "PASS" if (facts.get(metric) or 0) >= least else "FAIL"
        verdicts.say(verdict, what, **facts, **({"aim": f"{metric} >= {least:g}"} if metric else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="networks and batches of a toy's size")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each verdict")
    parser.add_argument("--budget", type=float, default=460, help="seconds in all; speeds that do not fit in are left out")
    parser.add_argument("--only", default="parity,waits,resume,speed", help="sections, as in parity,speed")
    parser.add_argument("--measure", choices=[*SPEEDS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu --toy tries the program without one")
    if arguments.measure:
        print("RESULT " + json.dumps(measure(arguments.measure, arguments.toy)), flush=True)
        return
    verdicts = Verdicts(arguments.out)
    words = ["--device", arguments.device, *(["--toy"] if arguments.toy else [])]
    sections: dict[str, Callable[[], None]] = {
        "parity": lambda: parity(verdicts, arguments.toy), "waits": lambda: waits(verdicts, arguments.toy),
        "resume": lambda: resume(verdicts, arguments.toy),
        "speed": lambda: speed(verdicts, arguments.budget, words, arguments.toy)}
    for name in arguments.only.split(","):
        sections[name]()
    failed = [each["what"] for each in verdicts.found if each["verdict"] == "FAIL"]
    print(f"{len(verdicts.found)} verdicts, {len(failed)} failed: {'; '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
