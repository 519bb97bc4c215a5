"""The family `gpt`: language models."""

from __future__ import annotations

from types import ModuleType

from genscale.data.text.settings import TextDataSettings
from genscale.evaluation.settings import TextSampling
from genscale.families.entry import Family, Sampler, Sampling
from genscale.families.gpt.settings import GPTSettings
from genscale.objectives.capabilities import WritesText


def _module() -> ModuleType:
    from genscale.families.gpt import objective as language_model

    return language_model


def _sampler() -> Sampler:
    from genscale.families.gpt.sampling import sample_gpt

    return sample_gpt


FAMILY = Family(
    GPTSettings, TextDataSettings, _module,
    sampling=Sampling(TextSampling, _sampler, needs=(WritesText,), example="--prompt 'The' --tokens 200"),
    tiny={"model.layers": 2, "model.heads": 2, "model.width": 32, "model.positions": 32, "data.source": "python-docs",
          "data.tokenizer": "bytes", "data.sequence_length": 32, "data.validation_blocks": 4},
)  # fmt: skip
