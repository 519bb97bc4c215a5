"""What a run on prompts would be asked, for people to read."""

from __future__ import annotations

from itertools import islice

from genscale.data.text.prompt_data import PromptData
from genscale.data.text.prompt_encoder import told_of
from genscale.data.text.prompt_settings import PromptDataSettings


def inspect_prompts(settings: PromptDataSettings, seed: int, count: int) -> int:
    """Print the first prompts in the order of the run, as the policy reads them, each with what its rewards are told. Raises
    UserError as a run would."""
    data = PromptData(settings, seed)
    for number in range(count):
        position, lane = divmod(number, data.lane_count)
        sample, _ = next(islice(data.open_lane(lane), position, None))
        tokens = [int(token) for token in sample["prompt"] if token >= 0]
        _, row = told_of(sample["row"].tobytes())
        print(f"--- prompt {number}, {len(tokens)} token{'s' if len(tokens) != 1 else ''}; its row: {row}\n"
              f"{data.tokenizer.decode(tokens)}")
    print(f"{len(data.validation()):,} prompts to validate with")
    data.close()
    return 0
