"""`genscale sample`: text shown as it is drawn, many prompts from a file, and the speed beside it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import threading

import pytest

from genscale.cli import main
from genscale.errors import UserError
from genscale.families.gpt.sampling import TextSampling, prompts_of
from genscale.testing.processes import GENSCALE, clean_environment


def done(outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_prompts_of_a_file_write_what_each_writes_alone(genscale, trained, tmp_path):
    prompts = ["The ", "a statement is", "x" * 50, "Ünï"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*prompts[:2], "  ", *prompts[2:]]) + "\n", encoding="utf-8")
    settings = ("--tokens", 40, "--seed", 3)
    together = done(genscale("sample", trained, "--prompts", file, "--count", 2, *settings))
    parts = re.split(r"--- \d of 8 ---\n", together)
    assert parts[0] == "" and together.count("--- 8 of 8 ---") == 1
    alone = [done(genscale("sample", trained, "--prompt", prompt, "--count", 2, *settings)) for prompt in prompts]
    expected = [text for both in alone for text in re.split(r"--- \d of 2 ---\n", both)[1:]]
    assert parts[1:] == expected and len(set(expected)) == 8


def test_the_speed_is_told_beside_the_text(genscale, trained):
    outcome = genscale("sample", trained, "--prompt", "The ", "--tokens", 30, "--seed", 1)
    line = r"^([\d,]+) tokens in ([\d.]+) s, ([\d,]+) tokens/s$"
    tokens, seconds, speed = re.search(line, outcome.err, re.MULTILINE).groups()
    assert 0 < int(tokens) <= 30
    assert int(speed.replace(",", "")) == pytest.approx(int(tokens) / float(seconds), rel=0.3)
    assert "tokens/s" not in outcome.out


def test_text_shows_before_the_next_token_is_drawn(trained):
    """A reader that hangs up after some characters ends the run long before it has drawn a million tokens."""
    command = [*GENSCALE, "sample", str(trained), "--prompt", "The ", "--tokens", "1000000", "--temperature", "0"]
    process = subprocess.Popen(command, env=clean_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.read(8).startswith("The ")
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert "tokens/s" not in process.stderr.read()  # which is told at the end
    finally:
        process.kill()


@pytest.mark.parametrize(("content", "words"), [
    (None, ["cannot be read"]), (b"\n \n", ["holds no prompt"]), (b"\xff\xfe\xff", ["cannot be read", "UTF-8"]),
    (b"", ["holds no prompt"]),
])  # fmt: skip
def test_a_file_of_prompts_that_is_none_is_refused(content, words, genscale, trained, tmp_path):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    message = genscale("sample", trained, "--prompts", file).message_of_run()
    assert all(word in message for word in ["prompts", *words, str(file)]), message


def test_a_prompt_beside_a_file_of_prompts_is_refused(genscale, trained, tmp_path):
    message = genscale("sample", trained, "--prompts", tmp_path / "x", "--prompt", "The").message_of_run()
    assert "prompts" in message and "leave one out" in message


def test_only_a_line_break_ends_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    lines = ["\ufeffbyte order mark", "line\u2028separator", "form\x0cfeed and\x0bvertical tab", "next\x85line", " \t", "a\rb"]
    file.write_bytes("\r\n".join(lines[:3]).encode() + "\n".join(["", *lines[3:]]).encode())
    expected = [lines[0][1:], *lines[1:4], lines[5]]
    assert prompts_of(TextSampling(prompts=str(file))) == expected
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()))
    writer.start()
    assert prompts_of(TextSampling(prompts=str(pipe))) == expected
    writer.join()


def test_prompts_are_read_up_to_a_size(tmp_path):
    for name, words in (("/dev/zero", "has more than the 134,217,728 bytes"), (tmp_path, "cannot be read .Is a directory")):
        with pytest.raises(UserError, match=f"^prompts: {name} {words}"):
            prompts_of(TextSampling(prompts=str(name)))


def test_a_prompt_that_is_no_text_or_no_file_is_one_line(genscale, trained):
    message = genscale("sample", trained, "--prompt", os.fsdecode(b"caf\xe9")).message_of_run()
    assert "prompt: 'caf\\udce9' is not UTF-8 from character 4 on" in message
    assert "--prompts: '' is empty" in genscale("sample", trained, "--prompts", "").message_of_run()


@pytest.mark.parametrize("settings", [("--top_p", "1e-50"), ("--temperature", "1e-46"), ("--temperature", "1e-300"),
                                      ("--temperature", "1e-39", "--top_k", "5", "--top_p", "0.9")])  # fmt: skip
def test_a_setting_below_what_fp32_holds_takes_the_likeliest_token(settings, genscale, trained):
    likeliest = done(genscale("sample", trained, "--prompt", "The ", "--tokens", 12, "--temperature", 0))
    assert done(genscale("sample", trained, "--prompt", "The ", "--tokens", 12, *settings)) == likeliest


def test_letters_that_the_terminal_does_not_know_are_escaped(trained):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main(["sample", str(trained), "--prompt", "caf\u00e9", "--tokens", "1", "--temperature", "0"]) == 0
    out.flush()
    assert out.buffer.getvalue().startswith(rb"caf\xe9")
