"""Prompts as samples: token ids, and the bytes of what the rewards are told of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from genscale.data.lanes import Sample
from genscale.data.prompts import last_words, read_prompt
from genscale.data.spec import Spec
from genscale.data.text.chat_template import ChatTemplate, Refusal
from genscale.data.text.tokenizers import Tokenizer
from genscale.errors import UserError


class PromptEncoder:
    """Turns the documents of a source of prompts into samples: `prompt`, int32 `(prompt_tokens,)`, at the right end of its row
    with -1 before it; and `row`, uint8 `(row_bytes,)`, the prompt's words and its columns as JSON, filled up with zeros.

    With a chat template a prompt is what the user says, and ends where the assistant's answer begins. Without one it is its
    text, as that of prompt and answer pairs is.

    Args:
        tokenizer: its chat template is used if it has one.
        spec: the source, for messages.
        prompt_tokens, row_bytes: what fits.

    Raises:
        UserError: conversations without a chat template.
    """

    def __init__(self, tokenizer: Tokenizer, spec: Spec, prompt_tokens: int, row_bytes: int) -> None:
        self._tokenizer, self._spec, self._prompt_tokens, self._row_bytes = tokenizer, spec, prompt_tokens, row_bytes
        if spec.messages and not tokenizer.companions.chat_template:
            raise UserError(f"{spec.setting('messages_column')}={spec.messages}: data.tokenizer={tokenizer.name} has no chat "
                            "template to write conversations with; give the folder of a chat model's tokenizer, or set "
                            "prompt_column")
        _ = self._template  # one that cannot be read is refused now

    @cached_property
    def _template(self) -> ChatTemplate | None:
        beside, tokenizer = self._tokenizer.companions, self._tokenizer
        if not beside.chat_template:
            return None
        return ChatTemplate(beside.chat_template, beside.special_tokens, tokenizer.special_texts, tokenizer.name,
                            tokenizer.texts_of(beside.end_ids))

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_template"}  # compiled code does not travel

    @property
    def digest(self) -> str:
        """SHA-256 of the chat template and of what it refers to, or "plain"."""
        beside = self._tokenizer.companions
        if not beside.chat_template:
            return "plain"
        return hashlib.sha256(json.dumps([beside.chat_template, beside.special_tokens], sort_keys=True).encode()).hexdigest()

    def encode(self, documents: Sequence[str]) -> list[Sample | None]:
        """The sample of each document; None for one that is left out, which is counted.

        Raises:
            UserError: too many are left out.
        """
        read = [read_prompt(document) for document in documents]
        ids = self._ids([asked for asked, _ in read])
        samples: list[Sample | None] = []
        for document, (asked, row), tokens in zip(documents, read, ids, strict=True):
            self._spec.left_out.written += 1
            try:
                if isinstance(tokens, Refusal):
                    raise tokens
                samples.append(self._sample(tokens, {"prompt": last_words(asked), "row": row}))
            except UserError as error:
                where = getattr(document, "where", "")
                self._spec.left_out.refuse(UserError(f"{where}: {error}") if where else error, written=True)
                samples.append(None)
        return samples

    def refuse(self, document: str) -> bool:
        """Whether a document is left out; that is counted. Raises UserError where too many are."""
        return self.encode([document])[0] is None

    def _ids(self, asked: Sequence[object]) -> list[list[int] | Refusal]:
        if self._template is None:
            return list(self._tokenizer.encode_batch([str(prompt) for prompt in asked]))
        texts: list[str | Refusal] = []
        for prompt in asked:
            try:
                messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
                texts.append(self._template.asked(messages))
            except Refusal as refusal:
                texts.append(refusal)
        encoded = iter(self._tokenizer.encode_chats([text for text in texts if isinstance(text, str)]))
        return [next(encoded)[0] if isinstance(text, str) else text for text in texts]

    def _sample(self, tokens: Sequence[int], told: dict[str, object]) -> Sample:
        content = json.dumps(told, ensure_ascii=False).encode()
        if not tokens:
            raise UserError("it is no token long; mend or remove it")
        if len(tokens) > self._prompt_tokens:
            raise UserError(f"its prompt is {len(tokens):,} tokens long, more than data.prompt_tokens={self._prompt_tokens}; "
                            "shorten it, or set more")
        if len(content) > self._row_bytes:
            raise UserError(f"it is {len(content):,} bytes of JSON with its columns, more than data.row_bytes="
                            f"{self._row_bytes}; leave out of data.columns what no reward reads, or set more")
        prompt = np.full(self._prompt_tokens, -1, np.int32)
        prompt[self._prompt_tokens - len(tokens):] = tokens
        row = np.zeros(self._row_bytes, np.uint8)
        row[: len(content)] = np.frombuffer(content, np.uint8)
        return {"prompt": prompt, "row": row}


def told_of(row: bytes) -> tuple[str, dict[str, object]]:
    """A prompt's words and its columns, of the bytes of a `row`."""
    content = json.loads(row.rstrip(b"\0"))
    return content["prompt"], content["row"]
