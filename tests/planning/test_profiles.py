"""Profiles of devices: shipped ones agree with the table of peaks, one's own is read back equal, mistakes say where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genscale.errors import UserError
from genscale.planning.profiles import as_dict, profile, profile_names
from genscale.tracking.peaks import peak_flops


def test_shipped_profiles_are_whole():
    """Each has its peaks in the one table of them (the CPU has none), shares below one, and says where it comes from."""
    profiles = [profile(name) for name in profile_names()]
    assert len(profiles) >= 15 and len({each.device for each in profiles}) == len(profiles)
    for each in profiles:
        assert each.peaks == {} or each.device == "cpu"
        assert each.device == "cpu" or peak_flops(each.device, "fp32") == each.peak("fp32")
        assert all(0 < share <= 1 for share in (each.product, each.attention, each.memory, each.exposed))
        assert each.source and each.origin and each.link > each.between_nodes / each.gpus_per_node / 4
    assert profile("H100") == profile("h100") and profile("A100_40").memory_bytes < 40 * 2**30


def test_what_is_written_is_read_back(tmp_path: Path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(as_dict(profile("h200"))))
    mine = profile(f"mine={path}")
    assert as_dict(mine) == as_dict(profile("h200")) and mine.name == "mine"


@pytest.mark.parametrize(("change", "words"), [
    ({"memori": 1}, "mine.memori: unknown key (did you mean 'memory'?)"),
    ({"memory_bytes": -1}, "mine.memory_bytes: must be a whole number of at least 1"),
    ({"half": "wide"}, "mine.half: must be a number"),
    ({"product": 70}, "mine.product: is a share, of which 1 is the whole, not 70"),
    ({"link": None}, "mine.link: must be set; it has no default"),
])
def test_a_wrong_key_is_named(tmp_path: Path, change: dict[str, object], words: str):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**as_dict(profile("h100")), **change}))
    with pytest.raises(UserError) as caught:
        profile(f"mine={path}")
    assert words in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({name: value for name, value in as_dict(profile("h100")).items() if name != "link"}))
    with pytest.raises(UserError, match=r"mine.link: must be set"):
        profile(f"mine={path}")


@pytest.mark.parametrize(("name", "words"), [
    ("h1000", "did you mean 'h100'?"), ("A100_4", "did you mean 'a100-40'?"), ("=x.json", "write mine=x.json"),
    ("mine=/nowhere/x.json", "cannot be read: No such file"), ("abacus", "NAME=profile.json is one of your own"),
])
def test_an_unknown_profile_is_refused(name: str, words: str):
    with pytest.raises(UserError) as caught:
        profile(name)
    assert str(caught.value).startswith("--gpu: ") and words in str(caught.value)


def test_a_precision_that_is_not_computed_in():
    with pytest.raises(UserError, match="train.precision: bf16 is nothing that v100 computes in; use fp16 or fp32"):
        profile("v100").peak("bf16")


def test_a_device_that_no_table_knows_needs_peaks(tmp_path: Path):
    path = tmp_path / "profile.json"
    content = {**as_dict(profile("h100")), "device": "NVIDIA H900"}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"mine.peaks: must have FLOP/s by precision, as \{bf16: 1e14\}"):
        profile(f"mine={path}").peak("bf16")
    path.write_text(json.dumps({**content, "peaks": {"bf16": 3e14}}))
    assert profile(f"mine={path}").peak("bf16") == 3e14
