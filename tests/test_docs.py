"""The commands of README and docs/: each is one that its parser takes, and those of the tutorials run."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from genscale import plugins
from genscale.cluster.job_logs import LogSettings
from genscale.cluster.submission import print_script
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.families.registry import INSTALLED
from genscale.settings.parser import parse, parse_config, parse_settings, split_flags, take_number, take_text
from genscale.testing.forks import ForkServer
from genscale.testing.processes import group, run
from genscale.verbs import check_family, checkpoint, compare, plan, slurm, sync
from genscale.verbs.data import ACTIONS, BuildSettings, InspectSettings
from genscale.verbs.doctor import OWN, DoctorSettings
from genscale.verbs.export import ExportSettings
from genscale.verbs.tokenizer import TokenizerSettings
from genscale.verbs.trained import take_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Other tests of CI have the launchers of the tutorial of Slurm, on this machine and on a real one.
TUTORIALS = ("gpt", "gan", "reward", "resume", "own-network", pytest.param("slurm", marks=pytest.mark.matrix))
ON_THE_CLUSTER = "# on the cluster"
"""The first line of a block of a tutorial that is parsed and not run."""
TRUSTED = {"cat", "source", "$EDITOR", "pip", "wandb", ".venv/bin/ruff", ".venv/bin/pytest", ".venv/bin/mkdocs"}
"""Programs that are not ours."""
OWN_SCRIPT = "my_script.py"
"""The reader's, as the pages call it; it calls `genscale.train`."""


def blocks(page: Path, language: str = "bash") -> list[str]:
    """The blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block as words, without what is redirected."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&>")
        lexer.whitespace_split, words = True, []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&"):
                words = words[: words.index(">")] if ">" in words else words
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check(words: list[str]) -> None:
    """Raises what the command's own parser does."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program in TRUSTED:
        return
    if program == "genscale":
        VERBS[rest[0]](rest[1:])
    elif program == "accelerate":
        check_accelerate(rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        check_launched(strict(get_args_parser(), ["0" if word == "RANK" else word for word in rest]))
    elif program == "srun":
        assert rest[0] == "-n" and rest[1].isdigit(), rest
        check(rest[2:])
    elif program == ".ci/run":
        check_script(program, rest)
    elif program in ("bash", "python", ".venv/bin/python"):
        check_script(rest[0], rest[1:])
    else:
        raise AssertionError(f"{program} is no command that this test knows")


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    words = ["0" if word == "RANK" else word for word in words[1:]]
    parsed = strict(launch_command_parser(), words)
    assert parsed.config_file is None or (ROOT / parsed.config_file).is_file(), parsed.config_file
    check_launched(parsed)


def check_launched(parsed) -> None:
    """What a launcher is to start: a script, or genscale as a module."""
    if parsed.module:
        check([parsed.training_script, *parsed.training_script_args])
    else:
        check_script(parsed.training_script, parsed.training_script_args)


def check_script(script: str, arguments: list[str]) -> None:
    """A script of ours is there; what trains takes a run's settings, an example the words of genscale."""
    assert (ROOT / script).is_file() or script == OWN_SCRIPT, script
    if script.startswith("docs/examples/"):
        runpy.run_path(str(ROOT / script))  # registers its family
        try:
            check(["genscale", *arguments])
        finally:
            FAMILIES.registered.clear()
            FAMILIES.script = None
    if script in ("train.py", "launch/local.sh", "launch/quickstart.sh"):
        train(arguments)


def strict(parser, words: list[str]):
    """What argparse makes of the words; a mistake is an AssertionError with its message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(words)
    except SystemExit:
        raise AssertionError(said.getvalue()) from None


def train(words: list[str]) -> None:
    _, words = take_number(words, "--processes", least=1)
    _, words = take_number(words, "--audit", least=1)
    parse_config(FAMILIES, words)


def sample(words: list[str]) -> None:
    _, words = take_run(words, "")
    _, words = take_number(words, "--step", least=0)
    _, words = split_flags(words, lambda name: name.startswith("data."))
    any_of({entry.sampling.settings for entry in FAMILIES.values() if entry.sampling}, words)


def evaluate(words: list[str]) -> None:
    _, words = take_run(words, "")
    _, words = take_number(words, "--step", least=0)
    for flag in ("--on", "--tasks", "--include_path"):
        _, words = take_text(words, flag)
    _, words = take_number(words, "--limit", least=1)
    own, words = split_flags(words, lambda name: "." not in name)
    any_of({entry.scoring.settings for entry in FAMILIES.values() if entry.scoring}, own)
    any_of_families(words)


def any_of(kinds: set[type], words: list[str]) -> None:
    """One of the families' flags they must be."""
    refusals = [refusal_of(functools.partial(parse_settings, kind, words, "", "")) for kind in kinds]
    assert None in refusals, refusals


def any_of_families(words: list[str]) -> None:
    refusals = [refusal_of(functools.partial(parse_config, FAMILIES, [f"--model.family={name}", *words])) for name in FAMILIES]
    assert None in refusals, refusals


def refusal_of(act: Callable[[], object]) -> str | None:
    try:
        act()
    except UserError as error:
        return str(error)
    return None


def export(words: list[str]) -> None:
    _, words = take_run(words, "")
    _, words = take_number(words, "--step", least=0)
    parse_settings(ExportSettings, words, "", "")


def tokenizer(words: list[str]) -> None:
    assert words[0] == "train"
    parse_settings(TokenizerSettings, words[1:], "", "")


def data(words: list[str]) -> None:
    assert words[0] in ACTIONS
    if words[0] == "inspect" and "--config" in words:
        train(take_number(words[1:], "--blocks", least=1)[1])
    else:
        parse_settings({"build": BuildSettings, "inspect": InspectSettings}[words[0]], words[1:], "", "")


def doctor(words: list[str]) -> None:
    _, words = take_number(words, "--processes", least=1)
    own, run = split_flags(words, lambda name: name in OWN)
    parse_settings(DoctorSettings, own, "", "")
    if run:
        train(run)


def planned(words: list[str]) -> None:
    _, named, run = plan.read(words)
    for name in named or [""]:
        if name or run:
            train([*([f"--config={name}"] if name else []), *run])


def on_slurm(words: list[str]) -> None:
    action, *words = words
    assert action in slurm.ACTIONS
    if action in ("render", "submit"):
        out = io.StringIO()
        own, run = slurm.split_settings(words)
        if action == "submit":  # what Slurm is not asked for
            own = [word for word in own if word not in ("--dry-run", "--no-snapshot", "--no-plan")]
        with contextlib.redirect_stdout(out):
            assert print_script(["--site=site.yaml", *own], run) == 0
    elif action == "logs":
        parse_settings(LogSettings, [word for word in words if word.startswith("-")], "", "")
    else:
        assert {word for word in words if word.startswith("-")} <= ({"--sweep"} if action == "status" else set()), words


def no_words(words: list[str]) -> None:
    assert not words


VERBS: dict[str, Callable[[list[str]], object]] = {
    "train": train, "sample": sample, "evaluate": evaluate, "export": export, "tokenizer": tokenizer, "data": data,
    "doctor": doctor, "slurm": on_slurm, "compare": lambda words: parse(compare.parser(), words),
    "checkpoint": lambda words: parse(checkpoint.parser(), words), "sync": lambda words: parse(sync.parser(), words),
    "check-family": lambda words: parse(check_family.parser(), words), "families": no_words, "configs": no_words,
    "rewards": no_words, "plan": planned,
}  # fmt: skip


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A folder like the root of a clone, with the files that the pages say are the reader's; and the family that a page builds,
    as if it were installed."""
    monkeypatch.syspath_prepend(ROOT / "docs/examples/vq_vae")
    known = plugins._entry_points
    point = {"vq_vae": [EntryPoint("vq_vae", "vq_vae:FAMILY", INSTALLED.group)]}
    monkeypatch.setattr(plugins, "_entry_points", lambda group, path: point if group == INSTALLED.group else known(group, path))
    (tmp_path / "digits.yaml").symlink_to(ROOT / "docs/examples/vq_vae/digits.yaml")
    for name in ("configs", "docs", "launch", "train.py", "genscale", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "run.yaml").write_text((ROOT / "configs/gpt/demo.yaml").read_text())
    (tmp_path / "site.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_taken_by_its_parser(page, clone):
    found = [words for block in blocks(page) for words in commands(block)]
    assert found
    for words in found:
        try:
            check(words)
        except (UserError, AssertionError) as error:
            pytest.fail(f"{shlex.join(words)}\n{error}")


@pytest.mark.parametrize(("line", "said"), [
    ("genscale train --config configs/gpt/demo.yaml --train.stepps 3", "train.steps"),
    ("accelerate launch --config_file launch/fsdp3.yaml train.py --config run.yaml", "fsdp3"),
    ("accelerate launch train.py --config run.yaml --optimizer.lr fast", "optimizer.lr"),
    ("genscale sample runs/a --temprature 0.8", "temprature"), ("genscale checkpoint digests runs/a", "digests"),
    ("genscale slurm submit --config configs/gpt/demo.yaml --node 2", "nodes"), ("bash launch/demo.sh", "demo.sh"),
    ("genscale slurm status --swept runs/a", "swept"), ("genscale compare runs/a", "run_b"), ("unknown word", "unknown"),
])  # fmt: skip
def test_a_planted_mistake_is_found(line, said, clone):
    with pytest.raises((UserError, AssertionError, KeyError), match=said):
        for words in commands(line):
            check(words)


@pytest.mark.slow
def test_the_python_of_its_page_runs(clone):
    for number, block in enumerate(blocks(ROOT / "docs/how-to/python.md", "python")):
        assert '"train.steps": 300' in block
        (script := clone / f"{number}.py").write_text(block.replace('"train.steps": 300', '"train.steps": 40'))
        done = run(script, command=group(1), environment={"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}, folder=clone)
        assert done.code == 0, done.err
        assert number or "VAE (" in done.out


SHIM = """#!{python} {flags}
import os, sys
words = sys.argv[1:]
if "train" in words[:1] or "train.py" in words:
    words += [] if "--train.steps" in words else ["--train.steps", "4"]
    words += {smaller} if "configs/gpt/demo.yaml" in words else []
elif any(word.startswith("docs/examples/") for word in words):
    words = ["20" if word == "100" else word for word in words]
sys.argv[1:] = words
{start}
"""
"""A command that the tutorials type, which cuts runs short that say nothing of their steps, or 100, and makes the demo's
smaller."""
SMALLER = ["--model.layers", "1", "--model.width", "32", "--data.validation_blocks", "16"]
FORK = """
sys.path.insert(0, {root!r})
from genscale.testing.forks import fork
sys.exit(fork({address!r}, 1, ["-m", "genscale", *words], dict(os.environ)).wait())"""
STARTS = {
    "genscale": ("-S", FORK),
    "python": ("-S", FORK.replace('"-m", "genscale", ', "")),
    "accelerate": ("-u", "from accelerate.commands.accelerate_cli import main; main()"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TUTORIALS)
def test_the_commands_of_a_tutorial_run(name, clone):
    (clone / "bin").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "ACCELERATE_"))}
    environment |= {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = ForkServer(environment)
    for program, (flags, start) in STARTS.items():
        start = start.format(root=str(ROOT), address=server.address)
        (clone / "bin" / program).write_text(SHIM.format(python=sys.executable, flags=flags, smaller=SMALLER, start=start))
        (clone / "bin" / program).chmod(0o755)
    printed = []
    for block in blocks(ROOT / "docs/tutorials" / f"{name}.md"):
        if block.startswith(ON_THE_CLUSTER):
            continue
        done = subprocess.run(["bash", "-eu", "-c", block], cwd=clone, env=environment, capture_output=True, text=True,
                              timeout=400)
        assert done.returncode == (2 if "# refused" in block else 0), f"{block}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    server.close()
    if name == "resume":
        straight, stopped, *_ = printed[2].splitlines()
        assert straight == stopped and len(straight) == 64
        assert "equal but for rounding" in printed[3]
    if name == "gan":
        assert len(list((clone / "pictures").iterdir())) == 1000 and (clone / "digits.png").is_file()
