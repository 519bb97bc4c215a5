"""Masks in blocks against torch's own, and FlexAttention with them against attention with a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention import flex_attention as flex

from genscale.families.gpt.masks import BLOCK, MaskInBlocks, attention_mask
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.models.device_kind import planned_on
from genscale.parallel.activation_checkpointing import checkpoint_activations

CPU = torch.device("cpu")
SETTINGS = GPTSettings(preset="qwen3", layers=2, heads=4, kv_heads=2, head_width=16, width=32, positions=400, window=100)


def some_documents(kind: str, time: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(time)
    runs = (torch.rand(2, time, generator=generator) < 0.02).cumsum(1)
    padded = (torch.arange(time) >= torch.tensor([[time // 2], [time - 1]])).long()
    return {"none": None, "runs": runs, "of one token": torch.arange(time).expand(2, time), "padding": padded,
            "one that comes again": torch.randint(3, (2, time), generator=generator)}[kind]


CASES = [(300, None, "runs"), (256, None, "padding"), (300, 100, "none"), (384, 128, "none"), (300, 150, "runs"),
         (257, None, "of one token"), (256, 1, "none"), (300, 200, "one that comes again"), (129, 1000, "runs")]


def places(count: Tensor, indices: Tensor) -> Tensor:
    """Of blocks listed row by row, whether each is there."""
    listed = torch.arange(indices.shape[-1]) < count[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter_(-1, indices.long(), listed)


@pytest.mark.parametrize(("time", "window", "kind"), CASES)
def test_blocks_are_those_that_torch_finds_in_the_dense_mask(time: int, window: int | None, kind: str) -> None:
    documents = some_documents(kind, time)
    mask = MaskInBlocks(time, window, documents, CPU)
    ours = mask.blocks
    batch = 1 if documents is None else 2
    assert torch.equal(flex.create_mask(ours.mask_mod, batch, None, time, time, "cpu"), mask.dense)
    theirs = flex.create_block_mask(ours.mask_mod, batch, None, time, time, "cpu")
    found, expected = ([places(each.full_kv_num_blocks, each.full_kv_indices), places(each.kv_num_blocks, each.kv_indices)]
                       for each in (ours, theirs))
    for our, their in zip(found, expected, strict=True):
        assert torch.equal(our, their)
    assert torch.equal(places(ours.full_q_num_blocks, ours.full_q_indices), found[0].mT)
    assert torch.equal(places(ours.q_num_blocks, ours.q_indices), found[1].mT)
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE == (BLOCK, BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_is_attention_with_the_dense_mask(dtype: torch.dtype) -> None:
    for time, window, kind in CASES[:6] if dtype == torch.float32 else CASES[4:6]:
        documents = some_documents(kind, time)
        mask = MaskInBlocks(time, window, documents, CPU)
        generator = torch.Generator().manual_seed(1)
        query, key, value = (torch.randn(2, heads, time, 16, generator=generator).to(dtype) for heads in (4, 2, 2))
        with torch.no_grad():
            found = flex.flex_attention(query, key, value, block_mask=mask.blocks, enable_gqa=True)
        wide = (part.double() for part in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)))
        expected = F.scaled_dot_product_attention(*wide, attn_mask=attention_mask(time, time, window, documents, CPU))
        error = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=error, atol=error, msg=f"{time}, {window}, {kind}")


class InBlocks(GPT):
    """Takes masks in blocks on the CPU too."""

    def _masks_in_blocks(self, tokens: Tensor, dropout_keys: Tensor | None) -> bool:
        return True


@pytest.fixture
def backward_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses FlexAttention's backward on the CPU, for which its compiler has no kernel: as it is written it computes."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_tensors: None)
    torch._dynamo.reset()
    counters.clear()


def in_blocks(mode: str, backend: str | Callable = "aot_eager") -> tuple[GPT, GPT]:
    """A plain network, and the same compiled."""
    plain, other = GPT(SETTINGS, 61), InBlocks(SETTINGS, 61)
    plain.initialise(0)
    other.load_state_dict(plain.state_dict())
    checkpoint_activations(other.blocks(), mode, compiled=True)
    for block in other.blocks():
        block.compile(backend=backend)
    return plain, other


def gradients(network: GPT, tokens: Tensor, documents: Tensor | None) -> list[Tensor]:
    """The loss first."""
    loss = network(tokens[:, :-1], targets=tokens[:, 1:], documents=documents)
    loss.backward()
    found = [loss.detach(), *(parameter.grad.clone() for parameter in network.parameters())]
    network.zero_grad()
    return found


@pytest.mark.usefixtures("backward_on_the_cpu")
@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_compiled_blocks_have_the_gradients_of_a_dense_mask_in_one_graph(mode: str) -> None:
    plain, other = in_blocks(mode)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(61, (2, 301), generator=generator)
        documents = (torch.rand(2, 300, generator=generator) < 0.02).cumsum(1)
        for expected, found in zip(gradients(plain, tokens, documents), gradients(other, tokens, documents), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6 * expected.abs().max().item())
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.usefixtures("backward_on_the_cpu")
def test_selective_recomputation_keeps_what_flex_attention_gave() -> None:
    kinds: list[set[str]] = []

    def noting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        kinds.append({str(node.target) for node in graph.graph.nodes if "flex" in str(node.target)})
        return boxed_nop(graph, inputs)

    backend = aot_autograd(fw_compiler=noting, bw_compiler=noting, partition_fn=min_cut_rematerialization_partition)
    _, other = in_blocks("selective", backend)
    gradients(other, torch.ones(2, 301, dtype=torch.int64), None)
    assert kinds == [{"flex_attention"}, {"flex_attention_backward"}]


def test_compiled_blocks_that_are_run_as_they_are_written_take_the_dense_mask() -> None:
    plain, other = in_blocks("none")
    tokens, documents = torch.ones(2, 200, dtype=torch.int64), some_documents("runs", 200)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(other(tokens, documents=documents), plain(tokens, documents=documents))


def test_masks_are_in_blocks_where_a_gpu_computes_compiled_blocks_without_attention_dropout() -> None:
    tokens, keys = torch.ones(2, 200, dtype=torch.int64), torch.arange(2)
    network = GPT(SETTINGS, 61)

    def kinds(network: GPT, time: int = 200) -> list[bool]:
        return [network._masks_in_blocks(tokens[:, :time], each) for each in (None, keys)]

    assert kinds(network) == [False, False]
    with planned_on("gpu"):
        assert kinds(network) == [False, False]
    with planned_on("gpu", compiled=True):
        assert kinds(network) == [True, True]
        assert kinds(network, BLOCK) == [False, False]
        assert kinds(GPT(replace(SETTINGS, attention_dropout=0.1), 61)) == [True, False]
        assert kinds(GPT(replace(SETTINGS, head_width=8), 61)) == [False, False]
    network.blocks()[0].compile(backend="eager")
    assert kinds(network) == [False, False]
