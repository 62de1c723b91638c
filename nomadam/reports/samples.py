"""Pictures of samples that runs of diffusion models left in their folders."""

from pathlib import Path

from nomadam.reports.arms import Arm, Comparison
from nomadam.reports.drawing import Picture, best_of_each
from nomadam.reports.png_files import read_png
from nomadam.reports.reading import SAMPLES, RunRecord
from nomadam.reports.tables import MEASURES, fixed

MOST_PICTURES = 12


def show_samples(comparison: Comparison, folder: Path) -> list[Picture]:
    """Copy a picture of samples for each arm, or the best arm of each optimizer if many.

    Of an arm it is that of the first seed that has one. At most twelve are shown.

    Args:
        comparison: its runs may be without samples: then there is no picture.
        folder: exists already.
    """
    found = [
        (arm, run)
        for arm in best_of_each(comparison)
        if (run := next((run for run in arm.runs if run.has_samples), None)) is not None
    ]
    return [
        _picture(arm, run, folder / f"samples_{index + 1}.png")
        for index, (arm, run) in enumerate(found[:MOST_PICTURES])
    ]


def _picture(arm: Arm, run: RunRecord, path: Path) -> Picture:
    path.write_bytes(read_png(run.folder / SAMPLES))
    scores = [
        f"{head}: {fixed(factor * value, digits)}"
        for key, head, factor, digits in MEASURES
        if (value := arm.finals(key).get(run.seed)) is not None
    ]
    measured = f" Of this run, {'; '.join(scores)}." if scores else ""
    return Picture(
        name=path.stem,
        section="samples",
        title=f"Samples of {arm.label}",
        caption=f"Drawn by the model after the last step, seed {run.seed}, not selected.{measured}",
        alt=f"Samples drawn by the model of {arm.label}.",
        png=path,
    )
