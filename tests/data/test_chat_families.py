"""What is learnt of a conversation, against transformers: the same template with the assistant's part marked by hand.

The templates in chat_families/ are our own, in the shapes of published families; the mark stands after the header of a turn,
and ends with what ends it. `unmarked` is the template as such models ship it.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from genscale.data.spec import Spec
from genscale.data.text.chat_rendering import Refusal
from genscale.data.text.pairs import PairEncoder
from genscale.data.text.tokenizers import load_tokenizer, train_bpe

FAMILIES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).with_name("chat_families").iterdir())}


def unmarked(template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}\n", "", template)


SPECIAL = sorted({*re.findall(r"<[|\uff5c][^<>{}' ]*[|\uff5c]>", "".join(FAMILIES.values())), "<start_of_turn>", "<s>", "</s>",
                  "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]", "<|user|>", "<|system|>", "<|tool|>",
                  "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"} - {"<|endoftext|>"})
EOS = {"chatml": "<|im_end|>", "phi-3": "<|endoftext|>", "apertus": "<|assistant_end|>"}


def said(role: str, content: str | None = None, **more: object) -> dict[str, object]:
    return {"role": role, **({} if content is None else {"content": content}), **more}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": None, "names": ["a", "ü"]}}}
OFFERED = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
THOUGHT = "<think>\nlet me see\n</think>\n\nIt is 4."
HI, HELLO = said("user", "Hi"), said("assistant", "Hello!")
CHATS: dict[str, list[dict[str, object]]] = {
    "one turn": [said("user", "What is 2 + 2?"), said("assistant", "It is 4, naturally.")],
    "several": [said("user", "Hi\n\nthere  "), HELLO, said("user", "Say «東京»"), said("assistant", "東京 it is")],
    "system": [said("system", "Be kind."), HI, HELLO],
    "empty system": [said("system", ""), HI, HELLO],
    "trailing": [HI, said("assistant", "Hello!\n"), HI, said("assistant", "Hello!  \n\n")],
    "leading": [HI, said("assistant", "\n  Hello!"), HI, said("assistant", " Hello!")],
    "a letter": [HI, said("assistant", "I")],
    "echo": [said("user", "assistant\nHello!"), said("assistant", "assistant"), said("user", "Hello!"), HELLO],
    "thoughts": [said("user", "2 + 2?"), said("assistant", THOUGHT), said("user", "Sure?"), said("assistant", THOUGHT)],
    "thoughts apart": [said("user", "2 + 2?"), said("assistant", "It is 4.", reasoning_content="hm", thinking="hm"),
                       said("user", "Sure?"), said("assistant", "Yes.", reasoning_content="hm\n", thinking="hm\n")],
    "tools": [said("user", "Weather?"), said("assistant", "I will look.", tool_calls=[CALL]), said("tool", "sunny"),
              said("assistant", "Sunny.")],
    "nothing said": [said("user", "Weather?"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
                     said("tool", "sunny"), said("assistant", "Sunny.\n"), said("user", "Thanks"),
                     said("assistant", tool_calls=[CALL], thinking="hm")],
    "two answers": [HI, HELLO, said("assistant", "Again\n"), HI, HELLO],
    "assistant first": [HELLO, HI, HELLO],
    "the last word is the user's": [HI, HELLO, said("user", "Bye")],
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer.json with the special tokens of all families."""
    folder = tmp_path_factory.mktemp("vocabulary")
    backend = Backend.from_file(str(train_bpe(["the assistant says what the user says is 2 + 2 = 4"] * 3, 300, folder)))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend.to_str()


def encoder_of(folder: Path, vocabulary: str, template: str, eos: str) -> PairEncoder:
    (folder / "tokenizer.json").write_text(vocabulary)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return PairEncoder(load_tokenizer(str(folder)), Spec("data.source", "here", messages="m"), separate=False)


@cache
def transformers_tokenizer(vocabulary: str):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(vocabulary), bos_token="<s>")


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_equal_those_of_the_template_marked_by_hand(name: str, vocabulary: str, tmp_path: Path) -> None:
    theirs, eos = transformers_tokenizer(vocabulary), EOS.get(name, "</s>")
    theirs.eos_token = eos
    ours = encoder_of(tmp_path, vocabulary, unmarked(FAMILIES[name]), eos)
    own_marks = encoder_of(tmp_path, vocabulary, FAMILIES[name], eos)
    shown = 0
    for case, messages in CHATS.items():
        tools = OFFERED if case == "tools" else None
        document = json.dumps({"messages": messages, "tools": tools} if tools else messages)
        try:
            expected = theirs.apply_chat_template(messages, tools=tools, chat_template=FAMILIES[name], return_dict=True,
                                                  return_assistant_tokens_mask=True)
        except Exception:
            with pytest.raises(Refusal):
                ours._templates[0].answers(messages, tools)
            continue
        for encoder in (ours, own_marks):
            coded = encoder.encode([document])[0]
            ids, mask = (coded >> 1).tolist(), (coded & 1).tolist()
            count = len(expected["input_ids"])
            assert ids[:count] == expected["input_ids"], case
            told = [theirs.decode(np.array(ids[:count])[np.array(mask[:count]) == 1]),
                    theirs.decode(np.array(ids[:count])[np.array(expected["assistant_masks"]) == 1])]
            assert mask[:count] == expected["assistant_masks"], (case, *told)
            # The end of text is learnt where the assistant has the last word.
            assert mask[count:] in ([], [int(messages[-1]["role"] == "assistant")]), case
        shown += 1
    assert shown >= 5
