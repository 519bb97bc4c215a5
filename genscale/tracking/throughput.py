"""How fast training goes, from the times of the steps alone."""

from __future__ import annotations


class Throughput:
    """Speed over the steps since the last reading.

    Only what `step` is told counts, so time spent on evaluation, sampling and checkpoints stays out.
    All figures are means over the interval, hence they agree with each other: units per second times step seconds is the units
    in a step, and data wait over step seconds is the share of time lost to data.

    Args:
        unit: what is counted, in the plural: "tokens" gives `tokens_per_second`.
        flops_per_unit: of the model, forward and backward, without recomputation; None where it is not known.
        devices: how many compute together.
        peak: FLOP/s that one device can do at most at the precision used (`genscale.tracking.peaks`); None where unknown.
    """

    def __init__(self, unit: str, flops_per_unit: int | None = None, devices: int = 1, peak: float | None = None) -> None:
        self.unit, self.flops_per_unit, self.devices, self.peak = unit, flops_per_unit, devices, peak
        self._reset()

    def step(self, step_seconds: float, wait_seconds: float, units: float) -> None:
        """Add one step: its wall time in seconds (data wait included), the wait within it, its units over all ranks."""
        self._steps += 1
        self._seconds += step_seconds
        self._wait += wait_seconds
        self._units += units

    def read(self) -> dict[str, float]:
        """Figures since the last reading; or nothing.

        `<unit>_per_second`, `step_seconds` and `data_wait_seconds` (means a step); `data_wait_share`: their quotient, where
        there was a wait; `tflops_per_second`: of the model, a device;
        `mfu`: those over the device's dense peak (Chowdhery et al. 2022, PaLM, appendix B), only where the peak is known."""
        if not self._steps:
            return {}
        figures = {
            f"{self.unit}_per_second": self._units / self._seconds,
            "step_seconds": self._seconds / self._steps,
            "data_wait_seconds": self._wait / self._steps,
        }
        if self._wait:
            figures["data_wait_share"] = self._wait / self._seconds
        if self.flops_per_unit is not None:
            achieved = self.flops_per_unit * figures[f"{self.unit}_per_second"] / self.devices
            figures["tflops_per_second"] = achieved / 1e12
            if self.peak is not None:
                figures["mfu"] = achieved / self.peak
        self._reset()
        return figures

    def _reset(self) -> None:
        self._steps, self._seconds, self._wait, self._units = 0, 0.0, 0.0, 0.0
