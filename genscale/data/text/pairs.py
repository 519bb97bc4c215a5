"""Prompt/answer pairs and conversations as token ids, each with a mask of what is to be learnt: the answers and their end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import cast

import numpy as np

from genscale.data.conversations import read_document
from genscale.data.lanes import Sample
from genscale.data.packing import Place
from genscale.data.spec import Spec
from genscale.data.text.chat_rendering import Message, Refusal, Span
from genscale.data.text.chat_template import ChatTemplate
from genscale.data.text.tokenizers import Tokenizer
from genscale.data.windows import Source
from genscale.errors import UserError

LONGEST_RUN = 10_000
"""Conversations after each other that are left out, after which a lane is taken to hold no other."""
BATCH = 32
"""Conversations that are tokenised at a time; a lane that opens or resumes tokenises no more than this ahead."""


class PairEncoder:
    """Turns the documents of a source of pairs into tokens.

    With a chat template the text is exactly the template's, and so are the ids, special tokens included; the end of text
    follows where the template does not write it itself. Without one a pair is prompt, answer and end of text.

    Ids travel through the packing as `2 * id + mask`, so that no block can part a token from its mask.

    Args:
        tokenizer: its chat template is used if it has one.
        spec: the source, for messages.
        separate: whether documents are told apart by their end of text (`data.separate_documents`).

    Raises:
        UserError: conversations without a chat template.
    """

    def __init__(self, tokenizer: Tokenizer, spec: Spec, separate: bool) -> None:
        self._tokenizer, self._spec, self._separate = tokenizer, spec, separate
        if spec.messages and not tokenizer.companions.chat_template:
            raise UserError(f"{spec.setting('messages_column')}={spec.messages}: data.tokenizer={tokenizer.name} has no chat "
                            "template to write conversations with; give the folder of a chat model's tokenizer "
                            "(chat_template.jinja, or chat_template in tokenizer_config.json), or set prompt_column and "
                            "answer_column")
        for template in self._templates:  # one that cannot be read is refused now
            template.check()

    @cached_property
    def _templates(self) -> list[ChatTemplate]:
        """The chat template, and the one for conversations with tools, which may be the same; empty where there is none."""
        beside, tokenizer = self._tokenizer.companions, self._tokenizer
        sources = [beside.chat_template, beside.tool_template or beside.chat_template] if beside.chat_template else []
        made = {source: ChatTemplate(source, beside.special_tokens, tokenizer.special_texts, tokenizer.name,
                                     tokenizer.texts_of(beside.end_ids)) for source in dict.fromkeys(sources)}
        return [made[source] for source in sources]

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_templates"}  # compiled code does not travel

    @property
    def digest(self) -> str:
        """SHA-256 of the chat templates and of what they refer to, or "plain"."""
        beside = self._tokenizer.companions
        if not beside.chat_template:
            return "plain"
        content = [beside.chat_template, beside.special_tokens, *([beside.tool_template] if beside.tool_template else [])]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode(self, documents: Sequence[str]) -> list[np.ndarray | None]:
        """`2 * id + mask` of each document, int32 `(time,)`; None for one that is left out (see `refuse`).

        Raises:
            UserError: too many are left out, or the chat template does not fit the settings.
        """
        if not self._templates:
            return [*self._plain([read_document(document)[0] for document in documents])]
        written = [self._written(document) for document in documents]
        encoded = iter(self._tokenizer.encode_chats([text for text, _ in filter(None, written)]))
        return [self._join(*next(encoded), *each) if each else None for each in written]

    def refuse(self, document: str) -> bool:
        """Whether a document is left out, because the template refuses it or it cannot be told apart; that is counted.

        Raises:
            UserError: too many are.
        """
        return bool(self._templates) and self._written(document) is None

    def _written(self, document: str) -> tuple[str, list[Span]] | None:
        messages, tools = read_document(document)
        end = self._tokenizer.end_text
        self._spec.left_out.written += 1
        try:
            if self._separate and end and end in document:
                raise Refusal(f"data.separate_documents=true: it has the words {end}, the end of text of data.tokenizer="
                              f"{self._tokenizer.name}, at which the conversation would be cut; mend or remove it")
            return self._templates[bool(tools)].answers(messages, tools)
        except Refusal as error:
            where = getattr(document, "where", "")
            self._spec.left_out.refuse(UserError(f"{where}: {error}") if where else error, written=True)
            return None

    def _plain(self, conversations: Sequence[Sequence[Message]]) -> list[np.ndarray]:
        # Apart from each other: an answer's first token must not depend on whether the prompt is there to merge with.
        prompts, answers = ([messages[i]["content"] for messages in conversations] for i in (0, 1))
        return [np.concatenate([np.multiply(2, prompt, dtype=np.int32), np.multiply(2, answer, dtype=np.int32) + 1])
                for prompt, answer in zip(self._tokenizer.encode_documents(prompts, [False] * len(prompts)),
                                          self._tokenizer.encode_documents(answers, [True] * len(answers)), strict=True)]

    def _join(self, ids: list[int], offsets: list[Span], text: str, spans: list[Span]) -> np.ndarray:
        end = self._tokenizer.end_of_text
        if self._separate and end in ids[:-1]:
            raise UserError(f"data.separate_documents=true: the chat template of data.tokenizer={self._tokenizer.name} writes "
                            "the end-of-text token inside a conversation, which would be cut there; set "
                            "data.separate_documents=false")
        starts, ends = np.array(offsets).reshape(-1, 2).T
        mask = np.zeros(len(ids), np.int32)
        for start, stop in spans:
            if start < stop:  # a token that begins before the answer and reaches into it is the answer's first
                mask[np.searchsorted(ends, start, side="right") : np.searchsorted(starts, stop)] = 1
        coded = 2 * np.array(ids, np.int32) + mask
        if ids[-1:] == [end]:
            return coded
        # The end of text is the assistant's where it has the last word.
        return np.append(coded, np.int32(2 * end + bool(spans and not text[spans[-1][1]:].strip())))

    def read(self, source: Source, lane: int, place: Place | None = None) -> Iterator[tuple[np.ndarray, Place]]:
        """Endless documents of a lane, whole, with their places; without those that are left out.

        Raises:
            UserError: too many of them.
        """
        passed = 0
        for window in source.windows(lane, place):
            for first in range(window.start[0], len(window.rows), BATCH):
                numbers = range(first, min(first + BATCH, len(window.rows)))
                coded = self.encode([window.text(n) for n in numbers])
                yield from ((ids, window.place(n, 0)) for ids, n in zip(coded, numbers, strict=True) if ids is not None)
                passed = passed + len(coded) if all(ids is None for ids in coded) else 0
                if passed > LONGEST_RUN:
                    raise cast(UserError, self._spec.left_out.first)  # by now there was one

    def documents(self, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, Place]]:
        """Documents once, for the validation set and for counting."""
        batch: list[str] = []
        for document in documents:
            batch.append(document)
            if len(batch) == BATCH:
                yield from ((ids, {}) for ids in self.encode(batch) if ids is not None)
                batch = []
        if batch:
            yield from ((ids, {}) for ids in self.encode(batch) if ids is not None)

    def check(self, documents: Iterable[str]) -> None:
        """Refuse a source in which the mask hides every token; reads no further than to the first that it shows.

        Raises:
            UserError: nothing could be learnt.
        """
        if not any((ids & 1).any() for ids, _ in self.documents(documents)):
            raise self._spec.left_out.first or UserError(
                f"{self._spec.key}={self._spec.name}: the mask hides every token: the chat template of data.tokenizer="
                f"{self._tokenizer.name} marks nothing as the assistant's; mend its {{% generation %}} part, or set "
                "prompt_column and answer_column")


def unpack(block: np.ndarray) -> Sample:
    """A block of `2 * id + mask` as a sample: `tokens` int32 and `mask` uint8, both `(time + 1,)`. Padding stays -1."""
    return {"tokens": block >> 1, "mask": ((block & 1) * (block >= 0)).astype(np.uint8)}
