"""genscale export RUN --out DIR: a trained run as a Hugging Face folder, read back by transformers where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from genscale.errors import UserError
from genscale.families import family
from genscale.objectives.capabilities import WritesText
from genscale.settings.parser import parse_settings, take_number

USAGE = "genscale export RUN --out DIR [--step N]"
DESCRIPTION = ("Write a trained run as a Hugging Face folder: config.json, safetensors, tokenizer, generation config. RUN is a "
               "run folder (its latest checkpoint, or --step N's) or a checkpoint folder. Where transformers is installed, it "
               "loads the folder, and its logits and token ids must equal ours.")


@dataclass
class ExportSettings:
    """Where to, and in which numbers."""

    out: str | None = None
    """Folder to write; it must not exist yet, or be empty."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Numbers of the weights: as trained, or rounded to half the size."""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        parse_settings(ExportSettings, ["--help"], USAGE, DESCRIPTION)
        return 0
    import torch

    from genscale.families.gpt.network import GPT
    from genscale.interop.export import Source, check_out, export
    from genscale.verbs.trained import find_trained, load_weights, run_of, take_run

    path, rest = take_run(arguments, USAGE)
    step, rest = take_number(rest, "--step", least=0)
    settings = parse_settings(ExportSettings, rest, USAGE, DESCRIPTION)
    if settings.out is None:
        raise UserError(f"--out: missing: the folder to write ({USAGE})")
    out = Path(settings.out)
    check_out(out)
    config, checkpoint = find_trained(path, step)
    run, dtype = run_of(checkpoint), {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
    objective = family(config.model.family).restore(config, run)
    writes = getattr(objective, "writes", "")
    network = objective.networks.get(writes)
    if not isinstance(network, GPT):
        raise UserError(f"export: {path} is a {config.model.family}; only gpt and reward have a Hugging Face class")

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        device = load_weights(objective, checkpoint)
        for parameter in network.parameters():
            parameter.copy_(parameter.to(dtype))
        logits = network(tokens.to(device)).float().cpu()
        network.to("meta")
        return logits

    weights = checkpoint.weights(writes, averaged=True)
    source = Source(network.settings, network.vocab_size, weights, cast(WritesText, objective).tokenizer, run)
    difference = export(source, out, dtype, logits_of)
    print(f"{out}: step {checkpoint.step}, {network.parameter_count():,} parameters in {settings.dtype}")
    if difference is None:
        print("not checked: transformers is not installed (pip install transformers)")
    else:
        print(f"checked with transformers: same token ids; logits differ by at most {difference:.2g}")
    return 0
