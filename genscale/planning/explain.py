"""A plan explained: where the bytes of its peak and the seconds of its step come from."""

from __future__ import annotations

from collections.abc import Sequence

from genscale.planning.account import Exchange, Operation
from genscale.planning.plan import Plan, expected_error
from genscale.planning.time import FP8_SHARE, FUSED_BYTES
from genscale.planning.wording import gib, measured, name, rounded

MEANINGS = {
    "weights": "parameters and buffers that a GPU holds between steps, in fp32",
    "gathered weights": "what is gathered of other GPUs' shares, or copied to the precision of the arithmetic, at that moment",
    "gradients": "of the parameters that a GPU steps, or of all where they are summed after the last micro-batch",
    "exchange of gradients": "buffers in which they are summed over the GPUs",
    "optimizer state": "AdamW's two moments, Muon's or SGD's one, in fp32",
    "averages": "averaged weights (train.ema_half_life)",
    "activations": "what forward keeps for backward at that moment, and what the operation itself needs",
    "logits and loss": "the head's output and what the loss makes of it",
    "other": "batch, draws, and what belongs to nothing above",
    "caching allocator": "what torch's allocator holds beside the tensors: its blocks do not fit them exactly",
    "CUDA and NCCL": "context, kernels, workspaces, and the buffers of collectives",
}
SHOWN = 16
"""Operations and collectives of an explanation."""


def assumptions(plan: Plan) -> list[str]:
    """What a plan of this config takes for granted, a line each."""
    lines, host = [], plan.step.memory.host * min(plan.machine.gpus, plan.machine.gpus_per_node)
    if plan.config.train.precision == "fp8":
        lines.append(f"fp8: memory as in bf16; the blocks' products at {FP8_SHARE:.0%} of fp8's peak where bf16 would reach "
                     "its own (assumed)")
    if plan.config.parallel.compile:
        lines.append(f"compiled: memory as without a compiler, which keeps more, but for masks; the blocks' elementwise work "
                     f"at {FUSED_BYTES:.0%} of its traffic (assumed)")
    if host:
        lines.append(f"offloaded: {gib(host)} GiB of a node's host memory (modelled); the time of the way there and back is "
                     "not planned")
    return lines


def explain_memory(plan: Plan) -> str:
    """Where each byte of the peak comes from, and how it was found."""
    memory = plan.step.memory
    lines = [f"memory a GPU at its peak: {memory.part} of phase {memory.phase}{f', in {memory.layer}' if memory.layer else ''}"]
    for part in sorted(memory.parts, key=lambda part: -part.bytes):
        lines.append(f"  {name(part):<24}{gib(part.bytes):>8} GiB {part.bytes / plan.peak:>5.0%}  {part.certainty:<9}"
                     f"+-{gib(round(expected_error(part))):>5}  {MEANINGS[part.category]}")
    free = plan.gpu.memory_bytes - plan.peak
    spare = f"{plan.terms.spare:.0%} spare is {gib(plan.terms.spare * plan.gpu.memory_bytes)}"
    lines += [f"between steps a GPU holds {gib(memory.at_rest)} GiB (exact): weights, optimizer state, averages",
              f"{gib(plan.gpu.memory_bytes)} GiB are there, {gib(free)} stay free; {spare}, the expected error "
              f"{gib(plan.expected_error)}: {plan.verdict}",
              "exact: a closed form, tested to the byte; traced: the step itself on tensors without storage; replayed: a model "
              "of the caching allocator fed with the trace; modelled: of a library's code, or with measured constants; "
              "assumed: experience"]
    return "\n".join(lines)


def explain_time(plan: Plan) -> str:
    """What a step computes and sends, the largest first."""
    ordered = sorted(plan.step.operations, key=lambda each: (-each.flops * each.count, -each.bytes * each.count))
    total = sum(each.flops * each.count for each in ordered)
    lines = [f"operations of a step on one GPU, by arithmetic; in all {rounded(total / 1e12)} TFLOP",
             f"  {'':<34}{'phase':<16} {'part':<14}{'shape':<30}{'dtype':<10}{'calls':>9}{'TFLOP':>10}{'GiB moved':>11}"]
    lines += [f"  {_operation(each)}{_sums([each])}" for each in ordered[:SHOWN]]
    if rest := ordered[SHOWN:]:
        lines.append(f"  {f'and {len(rest):,} more':<105}{_sums(rest)}")
    if plan.step.exchanges:
        lines.append("collectives of a step, by bytes")
    lines += [f"  {_exchange(each)}" for each in sorted(plan.step.exchanges, key=lambda each: -each.bytes * each.count)[:SHOWN]]
    lines.append(f"the time of each: {plan.gpu.name}'s data sheet, and constants {plan.gpu.origin}; expected error of a step "
                 f"+-{plan.time.spread:.0%}{'' if measured(plan) else ' (less with --calibrate)'}")
    return "\n".join(lines)


def _operation(each: Operation) -> str:
    called = f"{each.name}{' (head)' if each.head else ''}"
    return f"{called:<34}{each.phase:<16} {each.part:<14}{'x'.join(map(str, each.shape)):<30}{each.dtype:<10}"


def _sums(operations: Sequence[Operation]) -> str:
    flops, moved = (sum(getattr(each, what) * each.count for each in operations) for what in ("flops", "bytes"))
    return f"{sum(each.count for each in operations):>9,.0f}{flops / 1e12:>10,.2f}{moved / 2**30:>11,.1f}"


def _exchange(each: Exchange) -> str:
    where = "inside a node" if each.within_nodes else "between nodes"
    return (f"{each.name:<16}{each.phase:<16} {each.part:<14}{each.ranks:>6} ranks {where:<15}{each.count:>9,.0f} x "
            f"{each.bytes / 2**20:,.1f} MiB{', while computing' if each.hidden else ''}")
