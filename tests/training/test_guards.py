"""Signals become a flag that is read between steps; handlers come back afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from genscale.training.guards import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
        other = signal.SIGTERM if number == signal.SIGINT else signal.SIGINT
        os.kill(os.getpid(), other)  # a launcher passes the same Ctrl-C on, perhaps as another signal
        assert stop.received == number
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_later_repeat_ends_the_process() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop._since -= 6  # as if the user had waited six seconds for the step to end
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
