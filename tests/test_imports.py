"""What a command does not use it does not load: libraries take up to seconds each. Lists of modules, not a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HELP = ["train", "sample", "evaluate", "export", "compare", "checkpoint list", "data build", "data inspect", "tokenizer train",
        "slurm render", "slurm submit", "slurm resubmit", "slurm begin", "slurm end", "slurm status", "slurm logs", "sync",
        "doctor"]
"""In the order they are run in, in one process."""
NO_HELP = ["torch", "numpy", "pandas", "pyarrow", "datasets", "transformers", "accelerate", "deepspeed", "wandb", "matplotlib",
           "sklearn", "scipy", "tokenizers", "tensorboard", "safetensors", "requests"]
NO_RUN_ALONE = ["pandas", "pyarrow", "datasets", "transformers", "deepspeed", "wandb", "sklearn", "scipy", "tensorboard",
                "requests", "huggingface_hub", "torch.distributed.checkpoint", "genscale.parallel.fsdp2",
                "genscale.parallel.zero", "genscale.families.dcgan.objective", "genscale.data.images.data"]
"""Of a language model on a text file, in one process, without trackers."""
CODE = """
import json, sys
from genscale.cli import main
def loaded(names): return [name for name in names if name in sys.modules]
"""


def of_process(code: str, *words: object) -> dict[str, list[str]]:
    """What the code, which has `loaded` and `main`, prints last, as JSON on stderr."""
    command = [sys.executable, "-c", CODE + code, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_no_help_waits_for_torch():
    code = """
found = {}
for verb in json.loads(sys.argv[1]):
    try:
        code = main([*verb.split(), "--help"])
    except SystemExit as end:
        code = end.code
    assert not code, verb
    found[verb] = loaded(json.loads(sys.argv[2]))
print(json.dumps(found), file=sys.stderr)
"""
    found = of_process(code, json.dumps(HELP), json.dumps(NO_HELP))
    assert found == {verb: [] for verb in HELP}


def test_a_run_loads_what_it_uses(tiny_config):
    """Nothing of torch's sharding is ours to ask for either: torch loads it itself, with its optimizers."""
    code = """
import genscale.training.run, genscale.verbs.trained
before = loaded(["torch.distributed.tensor", "torch._dynamo", "torch.distributed.fsdp", "matplotlib", "accelerate"])
assert main(["train", "--config", sys.argv[1], "--train.steps", "1", "--train.sample_every", "0"]) == 0
print(json.dumps({"before": before, "after": loaded(json.loads(sys.argv[2]))}), file=sys.stderr)
"""
    assert of_process(code, tiny_config, json.dumps(NO_RUN_ALONE)) == {"before": [], "after": []}
