"""Which setting is named where steps wait for data."""

from __future__ import annotations

from genscale.data.images.data import ImageDataSettings
from genscale.data.text.settings import TextDataSettings
from genscale.training.data_wait import DataWait, advice, cores


def test_the_setting_that_is_named_follows_what_is_set():
    assert advice(TextDataSettings(workers=0), cores=8) == "data.workers=1 (it is 0)"
    assert advice(TextDataSettings(workers=2), cores=8) == "data.workers=4 (it is 2)"
    assert advice(TextDataSettings(workers=6), cores=8) == "data.workers=7 (it is 6)"
    assert advice(TextDataSettings(workers=7), cores=8).startswith("data.cache=")
    assert advice(TextDataSettings(cache="tokens"), cores=1) == "data.prefetch_steps=4 (it is 2)"
    assert advice(ImageDataSettings(prefetch_steps=3), cores=1) == "data.prefetch_steps=6 (it is 3)"
    assert cores(10**6) == 1


def test_one_hint_a_run_and_none_for_the_first_interval():
    watch = DataWait(TextDataSettings(cache="tokens", workers=10**6), processes=1)
    shares = (0.9, 0.04, 0.05, 0.31, 0.9)
    assert [watch.hint(share) for share in shares] == [None, None, None, (
        "steps wait for data 31% of their time; try data.prefetch_steps=4 (it is 2)"), None]
    assert DataWait(None, 1).hint(0.9) is None
