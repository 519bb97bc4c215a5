"""What a run changes in the process that it runs in, and how that is as it was when the run is over: the process may be a
notebook's, or a program's with a log and plans of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from genscale.tracking.run_logging import forget_run

TORCHS_COMPILER = {"allow_unspec_int_on_nn_module": False, "recompile_limit": 8, "optimize_ddp": True}
"""What an engine changes of torch.compile, as torch has it: asked for before it is loaded, it need not be."""


@contextlib.contextmanager
def process_left_as_found() -> Iterator[None]:
    """Inside, a run and the libraries it loads may change what they like; afterwards environment, logging, warnings, hooks for
    errors, and torch's global settings are what they were. (Signals and the process group are given back by who takes them.)
    """
    environment = dict(os.environ)
    hooks = (sys.excepthook, sys.exit, threading.excepthook, sys.unraisablehook)
    faults = faulthandler.is_enabled()
    before, logs = _torch_settings(), _Logging()
    try:
        with warnings.catch_warnings():
            try:
                yield
            finally:
                logs.restore()
    finally:
        _restore_torch(before)
        sys.excepthook, sys.exit, threading.excepthook, sys.unraisablehook = hooks
        if faulthandler.is_enabled() and not faults:
            faulthandler.disable()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def _torch_settings() -> dict[str, Any]:
    return {"dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(), "random": torch.get_rng_state(),
            "gradients": torch.is_grad_enabled(),
            "tf32": (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
            "linear": nn.functional.linear,
            "compiler": _compiler_settings(),
            "device": torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None}


def _restore_torch(before: dict[str, Any]) -> None:
    torch.set_default_dtype(before["dtype"])
    torch.set_num_threads(before["threads"])
    torch.set_rng_state(before["random"])
    torch.backends.cudnn.allow_tf32 = before["tf32"][0]
    torch.set_float32_matmul_precision(before["tf32"][1])
    nn.functional.linear = before["linear"]  # DeepSpeed's stage 3 leaves its own there
    torch.set_grad_enabled(before["gradients"])
    if (compiler := sys.modules.get("torch._dynamo")) is not None:
        for name, value in before["compiler"].items():
            setattr(compiler.config, name, value)
    if before["device"] is not None:
        torch.cuda.set_device(before["device"])


def _compiler_settings() -> dict[str, Any]:
    compiler = sys.modules.get("torch._dynamo")
    return {name: default if compiler is None else getattr(compiler.config, name) for name, default in TORCHS_COMPILER.items()}


class _Logging:
    """Handlers, levels and the like of every logger, as they are when it is made."""

    def __init__(self) -> None:
        self._captures = logging._warnings_showwarning is not None  # type: ignore[attr-defined]
        self._loggers = {logger: (list(logger.handlers), logger.level, logger.propagate, logger.disabled)
                         for logger in _loggers()}

    def restore(self) -> None:
        """Those that have come since lose what a run has put there, and no more: they are their library's."""
        forget_run()
        for logger, (handlers, level, propagate, disabled) in self._loggers.items():
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate, logger.disabled = propagate, disabled
        logging.captureWarnings(self._captures)


def _loggers() -> list[logging.Logger]:
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return [logging.getLogger(), *known]
