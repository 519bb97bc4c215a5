"""Image networks under every strategy, 2 processes (4 in groups of 2) against plain PyTorch in one: batch normalisation with
global statistics, spectral norm, gradient penalties, averages of weights, activation checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from genscale.models.moving_state import MovingState
from genscale.rng import Draws

WHOLE = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STRATEGIES = (*WHOLE, "groups", "zero3-groups")
SECOND_ORDER = ("ddp", "zero1", "zero2", "fsdp2", "groups")  # zero3 refuses
GROUPS = {"groups": ({"strategy": "fsdp2", "shard_size": 2}, 4), "zero3-groups": ({"strategy": "zero3", "shard_size": 2}, 4),
          "zero3-copies": ({"strategy": "zero3", "shard_size": 1}, 2)}
"""Settings and processes of the strategies that are one of the others in groups of processes."""
STEPS = 4
QUICK = {*(f"batchnorm {strategy}" for strategy in WHOLE), "spectral zero3", "spectral zero3-copies", "spectral fsdp2",
         "wasserstein zero2", "wasserstein fsdp2", "lazy ddp", "lazy zero1", "recomputed ddp selective",
         "recomputed zero3 full", "bf16 zero2", "bf16 fsdp2"}
"""The cells that are tested in every suite."""


def cells(*rows):
    """Parameters of a test, most of them in the slow suite only."""
    return [pytest.param(*row, marks=() if " ".join(row) in QUICK else pytest.mark.slow, id="-".join(row)) for row in rows]


KINDS = [*((kind, strategy) for kind in ("batchnorm", "spectral") for strategy in STRATEGIES), ("spectral", "zero3-copies"),
         *((kind, strategy) for kind in ("wasserstein", "lazy") for strategy in SECOND_ORDER)]
RECOMPUTED = [("recomputed", "ddp", "full"), ("recomputed", "ddp", "selective"), ("recomputed", "zero2", "full"),
              ("recomputed", "zero3", "full"), ("recomputed", "fsdp2", "full"), ("recomputed", "fsdp2", "selective"),
              *(("penalised", strategy, "full") for strategy in SECOND_ORDER)]
COMPILED = [(kind, strategy, "full") for kind in ("compiled", "compiled-spectral") for strategy in ("ddp", "fsdp2")]
RECOMPUTED_KIND = {"recomputed": "batchnorm", "penalised": "wasserstein", "compiled": "batchnorm",
                   "compiled-spectral": "spectral"}
BF16 = [("bf16", strategy) for strategy in STRATEGIES]


@pytest.fixture(scope="module")
def result(image_engines):
    """What came of a cell; the quick ones share one start of processes, so do the slow ones, and those of groups."""
    # Batch normalisation couples the samples of a forward: no accumulation there.
    variants = {f"{kind} {strategy}": {"kind": kind, "strategy": strategy, "resume_at": 2,
                                       "accumulation": 1 if kind == "batchnorm" else 2} for kind, strategy in KINDS}
    variants |= {" ".join(row): {"kind": RECOMPUTED_KIND[row[0]], "strategy": row[1], "activation_checkpointing": row[2]}
                 for row in RECOMPUTED}
    variants |= {" ".join(row): {"kind": RECOMPUTED_KIND[row[0]], "strategy": row[1], "activation_checkpointing": row[2],
                                 "compile": True, "resume_at": 2} for row in COMPILED}
    variants |= {" ".join(row): {"kind": "batchnorm", "strategy": row[1], "precision": "bf16", "resume_at": 2} for row in BF16}
    done = {}

    variants = {name: {**variant, **GROUPS.get(variant["strategy"], ({}, 2))[0]} for name, variant in variants.items()}

    def start_of(name):
        return name in QUICK, GROUPS.get(name.split()[1], ({}, 2))[1], name.startswith("compiled")

    def look_up(*row):
        name = " ".join(row)
        if name not in done:
            asked = {key: value for key, value in variants.items() if start_of(key) == start_of(name)}
            done.update(image_engines(asked, processes=start_of(name)[1]))
        return done[name]

    return look_up


class PlainGAN:
    """The same training by hand, the whole batch in one forward."""

    def __init__(self, worker, kind):
        self.worker, self.lines, self.snapshots = worker, [], []
        self.networks, reads = worker.networks_of(kind)
        for name, network in self.networks.items():
            for key, tensor in network.state_dict().items():
                tensor.copy_(reads[name](key))
        self.sgd = {name: torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
                    for name, network in self.networks.items()}
        for step in range(1, STEPS + 1):
            phases = [phase for phase in worker.KINDS[kind][1] if phase != "r1" or step % 2 == 0]
            self.lines.append({f"{phase}/loss": self.update(phase, step) for phase in phases})
            self.snapshots.append({key: value.clone() for key, value in self.networks["generator"].state_dict().items()})

    def update(self, phase, step):
        names = ("generator", "discriminator")
        trained, other = names if phase == "generator" else names[::-1]
        statistics = {key: buffer.clone() for key, buffer in self.networks[other].named_buffers()}
        for layer in self.networks[trained].modules():
            if isinstance(layer, MovingState):
                layer.begin_update()
        draws = Draws(1337, phase, step, torch.arange(self.worker.GLOBAL_BATCH))
        loss = self.loss(phase, self.worker.images(step), draws)
        loss.backward()
        for parameter in self.networks[trained].parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sgd[trained].step()
        for key, buffer in self.networks[other].named_buffers():
            buffer.copy_(statistics[key])
        for network in self.networks.values():
            network.zero_grad()
        return loss.item()

    def loss(self, phase, real, draws):
        discriminate = self.networks["discriminator"]
        if phase == "r1":
            real = real.clone().requires_grad_()
            return 5 * torch.autograd.grad(discriminate(real).sum(), real, create_graph=True)[0].square().sum() / len(real)
        fake = self.networks["generator"](draws.normal("noise", self.worker.LATENT))
        if phase == "generator":
            return F.softplus(-discriminate(fake)).mean()
        fake = fake.detach()
        if phase == "discriminator":
            return (F.softplus(discriminate(fake)) + F.softplus(-discriminate(real))).mean()
        share = draws.uniform("share", 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        gradient = torch.autograd.grad(discriminate(between).sum(), between, create_graph=True)[0]
        penalty = (gradient.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
        return discriminate(fake).mean() - discriminate(real).mean() + 10 * penalty

    def average(self):
        """The closed form: the weights after each step, each weighed by what the later steps have left of it."""
        batch, shares = self.worker.GLOBAL_BATCH, []
        for step in range(1, STEPS + 1):
            half_life = min(self.worker.HALF_LIFE, 0.05 * (step - 1) * batch)
            decay = 2 ** (-batch / half_life) if half_life else 0.0
            shares = [share * decay for share in shares] + [1 - decay]
        return {key: sum(share * snapshot[key].double() for share, snapshot in zip(shares, self.snapshots, strict=True)).float()
                for key in self.snapshots[0]}


@pytest.fixture(scope="module")
def truth(image_worker):
    return {kind: PlainGAN(image_worker, kind) for kind in image_worker.KINDS}


def check_equal(found, true):
    with torch.no_grad():
        for name, network in true.networks.items():
            for key, value in network.state_dict().items():
                torch.testing.assert_close(found["networks"][name][key], value, rtol=1e-4, atol=2e-5,
                                           msg=lambda text, key=key, name=name: f"{name}.{key}: {text}")


@pytest.mark.parametrize(("kind", "strategy"), cells(*KINDS))
def test_a_gan_trains_as_in_plain_pytorch(kind, strategy, result, truth, difference):
    """Losses of every phase, weights, running statistics (of frozen networks too) and singular vectors."""
    found, true = result(kind, strategy), truth[kind]
    for line, expected in zip(found["steps"], true.lines, strict=True):
        assert difference([line[key] for key in expected], list(expected.values())) < 1e-5
    check_equal(found, true)


def test_second_copies_change_no_bit_also_around_a_look_at_the_average(result):
    """A copy of the weights that others have taken the place of would be read without a word."""
    copies, plain = result("spectral", "zero3-copies"), result("spectral", "zero3")
    assert copies["steps"] == plain["steps"] and torch.equal(copies["made"], plain["made"])


@pytest.mark.parametrize(("kind", "strategy"), cells(*KINDS))
def test_the_average_is_the_closed_form(kind, strategy, result, truth):
    found, average = result(kind, strategy), truth[kind].average()
    assert found["averages"]["generator"].keys() == average.keys()
    for key, value in average.items():
        torch.testing.assert_close(found["averages"]["generator"][key], value, rtol=1e-4, atol=2e-5)
    weights = found["networks"]["generator"]
    assert any(not torch.allclose(weights[key], value, rtol=1e-3) for key, value in average.items())


@pytest.mark.parametrize(("kind", "strategy"), cells(*KINDS))
def test_networks_hold_the_average_inside_averaged_and_their_weights_again_after(kind, strategy, result, truth, image_worker):
    found = result(kind, strategy)
    assert found["untouched"]
    network = image_worker.networks_of(kind)[0]["generator"].eval()
    network.load_state_dict(found["averages"]["generator"])
    with torch.no_grad():
        torch.testing.assert_close(found["made"], network(image_worker.latents()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "strategy"), cells(*KINDS, *BF16))
def test_a_resume_is_bit_for_bit(kind, strategy, result):
    """Weights, statistics, singular vectors, optimizer and average, through full tensors by name and back."""
    assert result(kind, strategy)["resumed_alike"]


@pytest.mark.parametrize(("kind", "strategy"), cells(*KINDS, *BF16))
def test_networks_can_be_taken_back(kind, strategy, result):
    """As a restore after a collapse does: other weights for networks that have trained on."""
    assert result(kind, strategy)["taken_back"]


@pytest.mark.parametrize(("kind", "strategy"), cells(*(("spectral", strategy) for strategy in STRATEGIES[1:])))
def test_an_average_is_sharded_where_it_can_be(kind, strategy, result):
    found = result(kind, strategy)
    whole = sum(value.nbytes for value in found["averages"]["generator"].values())
    # ZeRO-1 and 2 shard the optimizer and its fp32 weights, so the average too.
    assert max(found["average_bytes"]) < 0.6 * whole


@pytest.mark.parametrize(("kind", "strategy", "mode"), cells(*RECOMPUTED))
def test_recomputation_changes_nothing_not_even_running_statistics(kind, strategy, mode, result, truth):
    """Nor the second backward of a penalty, which recomputes once more."""
    check_equal(result(kind, strategy, mode), truth[RECOMPUTED_KIND[kind]])


@pytest.mark.parametrize(("kind", "strategy", "mode"), cells(*COMPILED))
def test_what_is_compiled_and_recomputed_changes_nothing(kind, strategy, mode, result, truth):
    """Nor does a resume."""
    found = result(kind, strategy, mode)
    check_equal(found, truth[RECOMPUTED_KIND[kind]])
    assert found["resumed_alike"]


@pytest.mark.parametrize(("kind", "strategy"), cells(*BF16))
def test_bf16_keeps_statistics_in_fp32_and_is_close(kind, strategy, result, truth):
    found, true = result(kind, strategy), truth["batchnorm"].lines[0]
    assert found["buffer_dtypes"] == ["torch.float32"]
    # The first step; batch normalisation over eight samples magnifies what follows.
    assert 1e-7 < abs(found["steps"][0]["discriminator/loss"] / true["discriminator/loss"] - 1) < 1e-2
    weights = found["networks"]["generator"]["stages.0.conv.weight"]
    assert not torch.equal(weights, weights.bfloat16().float())


@pytest.mark.parametrize(("kind", "strategy"), cells(*(("wasserstein", strategy) for strategy in SECOND_ORDER)))
def test_statistics_are_logged_and_no_part_of_the_loss(kind, strategy, result):
    line = result(kind, strategy)["steps"][-1]
    assert line["critic/slope"] > 0
    assert line["critic/loss"] == pytest.approx(line["critic/critic"] + line["critic/penalty"], rel=1e-12)
