"""The environment of a job's processes for their communication: every variable in one place, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """A variable of the environment; `value` may refer to others of the shell, and `why` says what it is for."""

    name: str
    value: str
    why: str


def communication(logs: str, collective_seconds: int, interface: str | None) -> list[Variable]:
    """For NCCL and gloo.

    Args:
        logs: folder for what is written when a collective fails.
        collective_seconds: how long a collective may wait before it fails, as the run sets its process groups up.
        interface: name of the network to use, as ib0; None: what the libraries choose.
    """
    why = "the network that the processes meet in"
    chosen = [Variable("NCCL_SOCKET_IFNAME", interface, why), Variable("GLOO_SOCKET_IFNAME", interface, why)]
    return [
        *(chosen if interface else []),
        Variable("TORCH_FR_BUFFER_SIZE", "2000", "flight recorder: the last collectives of every process are kept in memory,"),
        Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "and written down when one of them fails, to see who was not there"),
        Variable("TORCH_FR_DUMP_TEMP_FILE", f"{logs}/nccl-rank-", "(one file a rank)"),
        Variable("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(collective_seconds),
                 "as long as a collective waits: guards.hang_minutes knows more, and speaks first"),
        Variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3", "a collective that fails ends its process; a hang would cost the job"),
        Variable("PYTHONUNBUFFERED", "1", "what is printed is in the log at once, also of a process that is killed"),
    ]  # fmt: skip
