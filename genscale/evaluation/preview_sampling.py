"""`genscale sample` for a family that has no sampler of its own: what its runs show of themselves while they train."""

from __future__ import annotations

from pathlib import Path

from genscale.errors import UserError
from genscale.evaluation.sample_files import picture_of_run, write_picture
from genscale.evaluation.settings import PreviewSampling
from genscale.evaluation.trained_run import TrainedRun


def sample_preview(run: TrainedRun, settings: PreviewSampling) -> None:
    """Print the text that `Objective.preview` makes, or write its picture and say where.

    Raises:
        UserError: the file cannot be written, or was asked for a text.
    """
    made = run.sample(settings.seed)
    if isinstance(made, str):
        if settings.out:
            raise UserError(f"--out: {settings.out}, but a run of model.family {run.config.model.family} makes text, which is "
                            "printed; leave it out")
        print(made)
        return
    file = Path(settings.out) if settings.out else picture_of_run(run.folder, f"sample-seed{settings.seed}")
    write_picture(file, made)
    print(file)
