"""The port at which the processes of a job meet: free on its first node as each life begins, and another one in each life."""

from __future__ import annotations

import contextlib
import socket

FIRST_PORT, PORTS = 20_000, 12_000
"""Below those that systems give to whoever asks for any."""
TRIES = 50
LIFE_STRIDE, TRY_STRIDE = 997, 61
"""Apart from each other, and from the ports of the jobs next to this one; both go round all ports."""


def free_port(job: int, restart: int) -> int:
    """A port of this machine that nobody listens at; any that the system gives where all that are tried are taken."""
    for attempt in range(TRIES):
        port = FIRST_PORT + (job + LIFE_STRIDE * restart + TRY_STRIDE * attempt) % PORTS
        if _is_free(port):
            return port
    with socket.create_server(("", 0)) as any_port:
        return any_port.getsockname()[1]


def _is_free(port: int) -> bool:
    """As the server of a process group would bind it."""
    both = socket.has_dualstack_ipv6()
    with contextlib.suppress(OSError):
        socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both).close()
        return True
    return False
