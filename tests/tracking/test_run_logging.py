"""What lands on the console and what in the rank's file, from real processes with the real libraries."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest

from genscale.errors import UserError
from genscale.tracking import run_logging
from genscale.tracking.run_logging import setup_logging

CHATTER = """
import logging, sys, warnings
from pathlib import Path
if sys.argv[3] == "early":
    import datasets, deepspeed, transformers
from genscale.tracking.run_logging import setup_logging
logger = setup_logging(sys.argv[1], int(sys.argv[2]))
import torch, datasets, deepspeed, transformers
from deepspeed.utils import logger as deepspeed_logger
deepspeed_logger.setLevel(logging.INFO)
deepspeed_logger.info("deepspeed chatters")
deepspeed_logger.warning("deepspeed warns")
from datasets.utils.logging import get_logger
get_logger("datasets.builder").warning("datasets warns")
transformers.utils.logging.get_logger("transformers.modeling_utils").warning("transformers warns")
logging.getLogger("torch.distributed").warning("torch warns")
logging.getLogger("torch._dynamo").warning("dynamo warns")
logging.getLogger("somebody").warning("somebody warns")
warnings.warn("python warns")
logger.info("loss fell")
logging.getLogger("genscale.data").warning("a column is short")
"""
QUIET = ["deepspeed chatters", "deepspeed warns", "datasets warns", "transformers warns", "torch warns", "dynamo warns",
         "somebody warns", "python warns"]  # fmt: skip


def _run(folder, rank: int, when: str, ci: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "TORCH_LOGS")}
    env["CI"] = ci  # where it says true, transformers' logger propagates
    if when == "early":  # DeepSpeed says on import which device it found, unless it is told
        env["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-c", CHATTER, str(folder), str(rank), when]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True)


@pytest.mark.parametrize(("rank", "when", "ci"), [(0, "late", "true"), (12, "early", ""), (0, "early", "true")])
def test_libraries_go_to_the_file_and_rank_0_speaks_plainly(tmp_path, rank, when, ci):
    done = _run(tmp_path, rank, when, ci)
    assert done.stdout == ""
    assert done.stderr.splitlines() == (["loss fell", "warning: a column is short"] if rank == 0 else [])
    text = (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()
    for message in [*QUIET, "loss fell", "a column is short"]:
        assert text.count(message) == 1 or message == "python warns", message
    assert "UserWarning: python warns" in text
    assert re.search(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO genscale: loss fell$", text, re.MULTILINE)


def test_a_resumed_run_appends_and_a_second_run_in_a_process_has_its_own_file(tmp_path, capsys):
    try:
        for folder, message in (("one", "first"), ("two", "second"), ("one", "third")):
            setup_logging(tmp_path / folder, 0).info(message)
            logging.getLogger("DeepSpeed").warning("after %s", message)
        texts = {folder: (tmp_path / folder / "logs" / "rank-00000.log").read_text() for folder in ("one", "two")}
        found = {folder: re.findall(r": (.*)$", text, re.MULTILINE) for folder, text in texts.items()}
        assert found == {"one": ["first", "after first", "third", "after third"], "two": ["second", "after second"]}
        assert capsys.readouterr().err.splitlines() == ["first", "second", "third"]
    finally:
        run_logging._detach_earlier()
        logging.captureWarnings(False)


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^run\.dir: .*cannot be written"):
        setup_logging(tmp_path / "file" / "run", 0)
