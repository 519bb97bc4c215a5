"""A real pretrained model: SmolLM2-135M-Instruct, Llama-shaped (30 layers, grouped queries, tied embeddings).

Needs its GGUF file in $GENSCALE_REAL_DATA/smollm2, and `pip install gguf` for transformers to read that.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from genscale.families.gpt.decoding import generate
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.interop.huggingface import open_huggingface
from genscale.testing.runs import Run

REAL = Path(os.environ.get("GENSCALE_REAL_DATA", "nowhere")) / "smollm2"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900),
              pytest.mark.skipif(not REAL.is_dir(), reason="needs GENSCALE_REAL_DATA, a folder that holds smollm2/*.gguf")]
TEXT = "The capital of France is Paris, and the capital of Germany is Berlin. Water boils at 100 degrees."


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder, its 4-bit weights written out in fp32."""
    pytest.importorskip("gguf")
    folder, file = tmp_path_factory.mktemp("smollm2"), next(REAL.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(REAL, gguf_file=file, dtype=torch.float32)
    config = quantised.config.to_dict()
    config.pop("quantization_config")
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REAL, gguf_file=file).save_pretrained(folder)
    return folder


def test_logits_and_greedy_text(smollm2: Path) -> None:
    fields, read = open_huggingface(str(smollm2))
    network = GPT(GPTSettings(**fields), fields["vocab_size"]).eval()
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(read(name))
        logits, expected = network(tokens), theirs(tokens).logits
    # Logits reach some 20 to 30 after 30 layers: 1e-5 of the largest.
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    told = generate(network, prompt, 12, positions=fields["positions"], generators=[torch.Generator()], temperature=0)
    with torch.no_grad():
        assert told.tolist() == theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1).tolist()
    assert "Paris" in tokenizer.decode(told[0])


def test_training_goes_on_and_comes_back(smollm2: Path, tiny_text: Path, tmp_path: Path, genscale) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({
        "run": {"name": "on", "dir": str(tmp_path)}, "model": {"from": str(smollm2)},
        "data": {"source": str(tiny_text), "sequence_length": 64, "validation_blocks": 2},
        "train": {"steps": 2, "global_batch_size": 2, "log_every": 1}, "optimizer": {"lr": 1e-5},
        "tracking": {"wandb": "disabled"}}))
    done = genscale("train", "--config", config)
    assert done.code == 0, done.err
    losses = Run(tmp_path / "on").losses()
    assert 1 < losses[0] < 5  # a model that knows English; one that knows nothing has ln(49152) = 10.8
    done = genscale("export", tmp_path / "on", "--out", tmp_path / "out", "--dtype", "bf16")
    assert done.code == 0 and "same token ids" in done.out, done.err
    talk = [{"role": "user", "content": "Hi"}]
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (smollm2, tmp_path / "out"))
    assert before.apply_chat_template(talk, tokenize=False) == after.apply_chat_template(talk, tokenize=False)
