"""A cached file that was edited is noticed, whatever was kept of it; one that was merely copied is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from genscale.data.readers import Spec
from genscale.data.text import cache_files, sources
from genscale.data.text.encoded import open_encoded
from genscale.data.text.tokenizers import ByteTokenizer
from genscale.errors import UserError

TEXT = "".join(f"text of some length, number {number:05}\n\n" for number in range(2000))


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Opens the cache in `cache` for the source in a folder."""
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    for number in range(3):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.txt").write_text(TEXT)

    def run(name: str = "text") -> None:
        source = sources.open_source(Spec("data.source", str(tmp_path / name)), fraction=0.0, window=8, seed=1, lanes=1)
        open_encoded(source, ByteTokenizer(), tmp_path / "cache").close()

    run()
    return run


def edit(file: Path, keep_time: bool) -> None:
    """Another word where no probe looks, with the same size."""
    before = os.stat(file)
    raw = file.read_bytes()
    at = len(raw) // 4
    file.write_bytes(raw[:at] + raw[at:].replace(b"length", b"LENGTH", 1))
    assert file.stat().st_size == before.st_size
    if keep_time:  # touch -r
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True])
def test_an_edit_of_the_same_size_is_noticed(tmp_path: Path, opened: Callable, keep_time: bool) -> None:
    opened()
    edit(tmp_path / "text" / "1.txt", keep_time)
    with pytest.raises(UserError, match=r"data.cache=.*cache: the cache of another source: 1.txt was edited since"):
        opened()
    shutil.rmtree(tmp_path / "cache")
    opened()


@pytest.mark.parametrize("copy", [shutil.copyfile, shutil.copy2])
def test_a_copy_elsewhere_is_the_same_source(tmp_path: Path, opened: Callable, copy: Callable) -> None:
    shutil.copytree(tmp_path / "text", tmp_path / "copied", copy_function=copy)
    opened("copied")
    opened("text")
    edit(tmp_path / "copied" / "2.txt", keep_time=True)
    with pytest.raises(UserError, match="2.txt was edited since"):
        opened("copied")


def test_a_cache_of_an_earlier_version_learns_its_files(tmp_path: Path, opened: Callable) -> None:
    for name in (cache_files.FILES, cache_files.SEEN):
        (tmp_path / "cache" / name).unlink()
    opened()
    edit(tmp_path / "text" / "0.txt", keep_time=False)
    with pytest.raises(UserError, match="0.txt was edited since"):
        opened()


def test_files_too_large_to_be_read_are_told_apart_by_their_times(tmp_path: Path, opened: Callable,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "DIGESTED_BYTES", 0)
    shutil.rmtree(tmp_path / "cache")
    opened()
    shutil.copytree(tmp_path / "text", tmp_path / "kept")
    opened("kept")
    os.utime(tmp_path / "kept" / "1.txt")
    with pytest.raises(UserError, match="1.txt was written again since the cache was made") as caught:
        opened("kept")
    command = str(caught.value).partition("(")[2].partition(")")[0]
    assert os.system(command) == 0
    opened("kept")
