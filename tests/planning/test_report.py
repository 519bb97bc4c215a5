"""What a plan says: never that something fits that might not, and each number with how it was found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from genscale.planning.account import Machine, MemoryPart
from genscale.planning.choose import Chooser
from genscale.planning.explain import explain_memory, explain_time
from genscale.planning.plan import EXPECTED_ERROR, Plan, Terms
from genscale.planning.report import table, text, ways

MACHINE = Machine("h100", 64, 8)


def with_parts(plan: Plan, *parts: MemoryPart) -> Plan:
    return replace(plan, step=replace(plan.step, memory=replace(plan.step.memory, parts=parts)))


@pytest.mark.parametrize("certainty", EXPECTED_ERROR)
def test_what_fits_does_so_with_the_spare_and_the_expected_error(certainty, hand_made, llama):
    plan = hand_made(llama(), MACHINE, Terms(spare=0.1))
    memory, error = plan.gpu.memory_bytes, EXPECTED_ERROR[certainty]
    for share, verdict in ((0.899 / (1 + error), "fits"), (0.901 / (1 + error), "too close"),
                           (0.999 / (1 - error), "too close"), (1.001 / (1 - error), "does not fit")):
        assert with_parts(plan, MemoryPart("activations", int(share * memory), certainty)).verdict == verdict


def test_the_report_names_every_part_and_how_it_was_found(hand_made, llama):
    plan = hand_made(llama(), MACHINE, Terms(price=2.5))
    said = text(plan).splitlines()
    assert said[0] == "llama-8b: 8.00B parameters (exact); 64 x H100 80GB HBM3 (8 a node, 3.2 Tb/s between nodes: assumed)"
    assert said[1].startswith("as the config says: fsdp2, micro-batch 2, accumulation 8, bf16, selective checkpointing, comp")
    assert said[1].endswith("FITS") and "blocks.31" in said[2]
    rows = {line[:28].strip(): line[28:69].split() for line in said[3:]}
    assert rows["weights kept"] == ["0.5", "exact"] and rows["activations kept"] == ["32.0", "traced"]
    assert rows["caching allocator"] == ["2.0", "replayed", "(x1.06)"] and rows["CUDA, NCCL, cuBLAS"] == ["2.0", "assumed"]
    assert rows["in all"] == ["37.9", "+-", "2.2", "of", "79.1", "(48%;", "spare", "10%)"]
    whole = "\n".join(said)
    assert f"119,209 steps: {plan.seconds / 86400:.1f} days" in whole and "at 2.5 an hour (+-20%" in whole
    assert "checkpoint 89.4 GiB (exact)" in whole and "every 99 steps" in whole  # half an hour of them


def test_ways_and_explanations_are_said(hand_made, llama):
    plan = hand_made(llama(), MACHINE)
    said = ways(Chooser(plan, planner=hand_made).neighbours())
    assert said.startswith("better by speed, best first:\n  --parallel.activation_checkpointing none")
    assert "GiB, too close)" in said and "zero1 (96.5 GiB)" in said
    unfit = hand_made(llama(strategy="ddp"), MACHINE)
    assert ways(Chooser(unfit, planner=hand_made).neighbours()).startswith("what fits, best first by speed:\n")
    assert "activations kept" in explain_memory(plan) and "to the byte" in explain_memory(plan)
    assert "aten.mm" in explain_time(plan) and "all_gather" in explain_time(plan)


def test_several_stand_side_by_side(hand_made, llama):
    said = table([("a", hand_made(llama(), MACHINE)), ("long name", "train.x: is wrong")]).splitlines()
    assert said[1].split()[:5] == ["a", "fits", "8.00B", "37.9", "of"] and said[2] == "long name  refused: train.x: is wrong"
