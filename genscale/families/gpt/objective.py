"""Next-token prediction: the likelihood of text under a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from genscale.data.lanes import Sample
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.tokenizers import KnownVocabulary, Tokenizer, load_tokenizer
from genscale.errors import UserError, nearest_divisors
from genscale.families.entry import NoSettings
from genscale.families.gpt.decoding import generate
from genscale.families.gpt.network import GPT
from genscale.families.gpt.settings import GPTSettings
from genscale.models.sequence_part import SequencePart
from genscale.objectives.base import Batch, Blueprint, Networks, Objective, Phase, Terms
from genscale.rng import Draws, torch_generator
from genscale.settings.config import Config
from genscale.writing import drafted

TOKENIZER_FILE = "tokenizer.json"
PREVIEW_TOKENS = 200
PREVIEW_TEMPERATURE = 0.8
MASKED = ("prompt_column", "messages_column")
"""Settings of data of which only the answers are learnt."""
VOCAB_MULTIPLE = 64  # matrix kernels want the width of the logits in whole tiles


class LanguageModel(Objective):
    """Trains one network, `gpt`, on the cross-entropy of the next token.

    A batch holds `tokens` `(batch, sequence_length + 1)`, int32 or int64: each token is the input whose target is the next
    one; -1 is padding. Where it also holds `mask`, of the same shape, only tokens with a mask above 0 are targets (the answers
    of prompt and answer pairs). The loss is in nats, summed over valid targets.

    Args:
        network: the model.
        tokenizer: what made the tokens; decodes previews and says how many bytes a token stands for.
        sequence_length: targets in a sample.
        separate_documents: a token sees its own document alone, and positions count from the document's start.
        weights: the network's initial weights by parameter name, each in full, fp32, on the CPU.
    """

    unit = "tokens"
    averaged = ("gpt",)
    writes = "gpt"

    def __init__(self, network: GPT, tokenizer: Tokenizer, sequence_length: int, *, separate_documents: bool = False,
                 weights: Callable[[str], Tensor] | None = None) -> None:
        self.networks, self._network = {"gpt": network}, network
        self._weights = weights
        self.phases = [Phase("language_model", "gpt", loss=self.loss, count=self.count)]
        self.tokenizer = tokenizer
        self.units_per_sample = sequence_length
        # Kept here because the network given to `preview` may stand inside a wrapper that hides it.
        self.positions, self.layers = network.settings.positions, network.settings.layers
        self.separate_documents = separate_documents
        self.drops = network.settings.dropout > 0 or network.settings.attention_dropout > 0
        self._flops = network.flops_per_token(sequence_length)
        lengths = tokenizer.token_bytes()
        self.token_bytes = None if lengths is None else torch.as_tensor(lengths, dtype=torch.int64)

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """The initial draw. Raises ValueError where the objective was made without one, for a network that has its weights."""
        if self._weights is None:
            raise ValueError("the objective was made without `weights`: its network has them already")
        return self._weights

    def flops_per_unit(self) -> int:
        """Floating-point operations of forward and backward for one token."""
        return self._flops

    def split_sequences(self, part: SequencePart) -> None:
        """By all-to-all over heads. Raises UserError where heads or targets cannot be dealt out evenly."""
        for key, number in (("model.heads", self._network.settings.heads), ("data.sequence_length", self.units_per_sample)):
            if number % part.of:
                raise UserError(f"parallel.context: {part.of} does not divide {key} {number}, which it deals out among as many "
                                f"processes; nearest values that do: {nearest_divisors(number, part.of)}")
        self._network.part = part

    def _targets(self, batch: Batch) -> Tensor:
        """What each position of this process's part has to predict, `(batch, time)` int64; -1 where there is nothing."""
        targets = batch["tokens"][:, 1:].long()
        return self._network.part.of_time(targets.where(batch["mask"][:, 1:] > 0, -1) if "mask" in batch else targets)

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """The phase's loss: nats summed over the valid targets of a micro-batch."""
        return {"loss": self._nats(networks, batch, draws.keys("dropout") if self.drops else None)}

    def _nats(self, networks: Networks, batch: Batch, dropout_keys: Tensor | None = None) -> Tensor:
        # Padding is fed as token 0: it stands after the text, so no valid target sees it.
        inputs = batch["tokens"][:, :-1].long().clamp(min=0)
        # The end-of-text token opens the next document, as it does when text is generated.
        documents = (inputs == self.tokenizer.end_of_text).cumsum(1) if self.separate_documents else None
        return networks["gpt"](inputs, targets=self._targets(batch), documents=documents, dropout_keys=dropout_keys)

    def count(self, batch: Batch) -> int:
        """Valid targets of a micro-batch."""
        return int((self._targets(batch) >= 0).sum())

    def save_assets(self, folder: Path) -> None:
        """Keep the tokenizer with the run: sampling must not depend on a file elsewhere."""
        with drafted(folder / TOKENIZER_FILE) as draft:
            self.tokenizer.save(draft)

    def use_assets(self, config: Config, folder: Path) -> Config:
        """The text is cut into the tokens the network was trained on."""
        if not (folder / TOKENIZER_FILE).exists():
            return config
        return replace(config, data=replace(config.data, tokenizer=str(folder / TOKENIZER_FILE)))

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """Sums in float64: `nats`, `tokens` and, where the tokenizer knows them, the `bytes` that the targets stand for."""
        targets = self._targets(batch)
        valid = targets >= 0
        totals = {"nats": self._nats(networks, batch).double(), "tokens": valid.sum().double()}
        if self.token_bytes is not None:
            self.token_bytes = self.token_bytes.to(targets.device)
            totals["bytes"] = self.token_bytes[targets[valid]].sum().double()
        return totals

    def summarise(self, totals: Mapping[str, float]) -> dict[str, float]:
        """`loss` (nats a token), `perplexity`, and `bits_per_byte`, which no tokenizer changes (Gao et al. 2020, The Pile)."""
        loss = totals["nats"] / totals["tokens"]
        # math.exp would raise where a diverged model's perplexity exceeds a float.
        metrics = {"loss": loss, "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item()}
        if "bytes" in totals:
            metrics["bits_per_byte"] = totals["nats"] / math.log(2) / totals["bytes"]
        return metrics

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        """Text that the network writes from the start of a document."""
        start = torch.full((1, 1), self.tokenizer.end_of_text, dtype=torch.int64, device=device)
        # No early stop: every rank must run the same number of forwards, also if rounding made one draw another token.
        tokens = generate(networks["gpt"], start, PREVIEW_TOKENS, positions=self.positions, layers=self.layers,
                          generators=[torch_generator(seed, "preview")], temperature=PREVIEW_TEMPERATURE,
                          vocab_size=self.tokenizer.vocab_size)
        return self.tokenizer.decode(tokens[0, 1:].tolist())


GPTConfig = Config[GPTSettings, TextDataSettings, NoSettings | None]


def build_data(settings: TextDataSettings, seed: int) -> TextData:
    return TextData(settings, seed)


def validation(settings: TextDataSettings, seed: int) -> list[Sample]:
    return TextData(settings, seed, for_training=False).validation()


def build(config: GPTConfig, data: TextData) -> LanguageModel:
    """The objective of a run, its network initialised from the run's seed. Raises UserError as `_build` does."""
    return _build(config, data.tokenizer)


def restore(config: GPTConfig, folder: Path) -> LanguageModel:
    """The objective of a trained run, with the tokenizer that its folder keeps."""
    kept = folder / TOKENIZER_FILE
    return _build(config, load_tokenizer(str(kept) if kept.exists() else config.data.tokenizer))


def blueprint(config: GPTConfig) -> Blueprint:
    """What a step is planned of. Raises UserError as `_build` does, and where only a tokenizer that is not here could tell how
    many tokens there are."""
    data = config.data
    objective = _build(config, planned_tokenizer(config.model, data.tokenizer))
    sample = {"tokens": torch.empty(data.sequence_length + 1, dtype=torch.int32, device="meta")}
    entries = data.sources if isinstance(data.sources, list) else []
    if any(getattr(data, name) or any(entry.get(name) for entry in entries) for name in MASKED):
        sample["mask"] = torch.empty(data.sequence_length + 1, dtype=torch.uint8, device="meta")
    return Blueprint(objective, sample)


def planned_tokenizer(settings: GPTSettings, name: str) -> Tokenizer:
    """A tokenizer of the model's vocabulary; the one called `name` where the model leaves that open. Raises UserError."""
    if settings.vocab_size is not None:
        return KnownVocabulary(settings.vocab_size)
    try:
        return load_tokenizer(name)
    except UserError as error:
        raise UserError(f"{error} (or, to plan without it, set model.vocab_size)") from None


def _build(config: GPTConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Network and objective.

    Raises:
        UserError: the sequence does not fit the positions, the tokens do not fit the vocabulary, or the shape is impossible.
    """
    length, positions = config.data.sequence_length, config.model.positions
    if length > positions:
        raise UserError(f"data.sequence_length: {length} is longer than model.positions {positions}; "
                        f"set data.sequence_length to at most {positions}, or model.positions to at least {length}")
    vocab_size = rows_of_embedding(config.model, tokenizer, config.data.tokenizer)
    with torch.device("meta"):  # the engine fills the parameters, or its share of them, from `initial_weights`
        network = GPT(config.model, vocab_size)
    return LanguageModel(network, tokenizer, length, separate_documents=config.data.separate_documents,
                         weights=lambda name: network.initial_weight(name, config.run.seed))


def rows_of_embedding(settings: GPTSettings, tokenizer: Tokenizer, name: str) -> int:
    """Rows of the embedding table: `model.vocab_size`, or the tokenizer's vocabulary rounded up.

    Args:
        name: of the tokenizer, for the message.

    Raises:
        UserError: the tokens do not fit the vocabulary.
    """
    needed = tokenizer.vocab_size
    rounded = -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    rows = settings.vocab_size or rounded
    if rows < needed:
        raise UserError(f"model.vocab_size: {rows} is smaller than the {needed} tokens of data.tokenizer "
                        f"{name}; the nearest allowed value is {needed} (or leave it out: {rounded})")
    return rows
