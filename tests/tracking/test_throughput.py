"""Speed figures against arithmetic by hand."""

from __future__ import annotations

import pytest

from genscale.tracking.throughput import Throughput


def test_figures_are_means_of_the_interval_and_agree_with_each_other():
    speed = Throughput("tokens")
    for seconds, wait in ((0.5, 0.1), (1.0, 0.2), (0.5, 0.0)):
        speed.step(seconds, wait, 1000)
    figures = speed.read()
    assert figures == pytest.approx({"tokens_per_second": 1500.0, "step_seconds": 2 / 3, "data_wait_seconds": 0.1,
                                     "data_wait_share": 0.15})
    assert figures["tokens_per_second"] * figures["step_seconds"] == pytest.approx(1000)


def test_reading_starts_a_new_interval():
    speed = Throughput("images")
    assert speed.read() == {}
    speed.step(100.0, 50.0, 1)
    speed.read()
    speed.step(0.25, 0.0, 8)
    assert speed.read() == {"images_per_second": 32.0, "step_seconds": 0.25, "data_wait_seconds": 0.0}
    assert speed.read() == {}


def test_mfu_is_the_models_flops_over_all_devices_peaks():
    speed = Throughput("tokens", flops_per_unit=6_000_000, devices=4, peak=1e9)
    speed.step(2.0, 0.0, 1000)
    figures = speed.read()  # 500 tokens/s, 3 GFLOP/s in all
    assert figures["tflops_per_second"] == pytest.approx(0.75e-3)
    assert figures["mfu"] == pytest.approx(0.75)


def test_an_unknown_device_has_no_mfu():
    speed = Throughput("tokens", flops_per_unit=10, devices=1, peak=None)
    speed.step(1.0, 0.0, 1)
    assert "mfu" not in speed.read()
