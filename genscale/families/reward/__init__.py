"""The family `reward`: a language model that goes on learning, from rewards for what it writes."""

from __future__ import annotations

from types import ModuleType

from genscale.data.text.prompt_settings import PromptDataSettings
from genscale.evaluation.settings import TextSampling
from genscale.families.entry import Family, Sampler, Sampling
from genscale.families.reward.settings import RewardObjectiveSettings, RewardSettings
from genscale.objectives.capabilities import WritesText


def _module() -> ModuleType:
    from genscale.families.reward import objective

    return objective


def _sampler() -> Sampler:
    from genscale.families.gpt.sampling import sample_gpt

    return sample_gpt


FAMILY = Family(
    RewardSettings, PromptDataSettings, _module, RewardObjectiveSettings,
    sampling=Sampling(TextSampling, _sampler, needs=(WritesText,), example="--prompt '07+95=' --tokens 4"),
    tiny={"model.from": "scratch", "model.layers": 2, "model.heads": 2, "model.width": 32, "model.positions": 16,
          "data.source": "sums", "data.prompt_tokens": 8, "data.row_bytes": 64, "data.validation_prompts": 4,
          "objective.tokens": 6, "objective.group": 4,
          "objective.rewards": [{"name": "regex", "pattern": "[ -~]{2}", "where": "anywhere"}]},
)  # fmt: skip
