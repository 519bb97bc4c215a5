"""Signals become a flag that is read between steps; handlers come back afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from genscale.supervise.signals import SIGNALS, Stopped, StopSignal


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
        for other in SIGNALS:  # a launcher passes the same one on, a scheduler sends another
            os.kill(os.getpid(), other)
        assert stop.received == number
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_later_ctrl_c_ends_the_process_and_a_later_sigterm_does_not() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        stop._since -= 6  # as if six seconds had gone into the checkpoint
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_start_that_waits_in_a_library_ends_too() -> None:
    """Behind a lock that never opens, taken outside Python: a Python handler does not run there."""
    code = ("import ctypes, sys; from genscale.supervise.signals import StopSignal\n"
            "lock = ctypes.CDLL(None); mutex = ctypes.create_string_buffer(64)\n"
            "with StopSignal(starting=True):\n"
            "    lock.pthread_mutex_lock(mutex); print('waiting', flush=True); lock.pthread_mutex_lock(mutex)")
    waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout.readline() == "waiting\n"
    time.sleep(2)  # from the print to the lock
    waiting.send_signal(signal.SIGUSR1)
    try:
        assert waiting.wait(20) == 138
    finally:
        waiting.kill()
        waiting.communicate()


def test_before_the_loop_a_signal_ends_what_goes_on_and_is_not_lost() -> None:
    with StopSignal(starting=True) as stop:
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.signal == stop.received == signal.SIGTERM
    with StopSignal(starting=True) as stop:
        stop.loop_begins()
        with stop:  # the loop's own use of it
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


@pytest.mark.parametrize("seconds", [-100, 1])
def test_a_job_that_has_missed_the_signal_stops_at_its_time(seconds: float, monkeypatch) -> None:
    monkeypatch.setenv("GENSCALE_STOP_AT", str(time.time() + seconds))
    with StopSignal(starting=True) as stop, pytest.raises(Stopped):
        time.sleep(20)
    assert stop.received == signal.SIGUSR1


def test_what_has_ended_before_its_time_is_left_in_peace(monkeypatch) -> None:
    monkeypatch.setenv("GENSCALE_STOP_AT", str(int(time.time()) + 1))
    with StopSignal(starting=True):
        pass
    time.sleep(1.5)  # SIGUSR1 would end this process


def test_a_hangup_that_is_to_be_survived_is_but_not_where_a_launcher_passes_it_on(monkeypatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
