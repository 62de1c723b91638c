"""Pictures of the trainings behind the claims: curves, rates, grids and gains of each setting."""

from collections.abc import Collection
from pathlib import Path

from nomadam.reports.arms import read_comparison
from nomadam.reports.drawing import Picture
from nomadam.reports.figures import draw_learning_curves
from nomadam.reports.gain_curves import FILE, draw_gain_curves
from nomadam.reports.grid_figures import draw_grids
from nomadam.reports.reading import read_run
from nomadam.reports.sensitivity_figures import draw_sensitivity


def draw_claims(kept: Path, finals: Collection[int], out: Path) -> list[Picture]:
    """Draw what each setting has numbers for.

    Of arms the learning curves of the finals, with bands over their seeds, and the final loss of
    the trials against the learning rate; of a grid its heat maps and surfaces, over all seeds; of
    measured gains the curves of one seed; of the clock nothing.

    Args:
        kept: holds a folder for each setting, and those the folders of what has ended.
        finals: seeds of the finals; trainings with other seeds are trials.
        out: gets a folder for each setting that is drawn; is made where it is missing.

    Returns:
        what was drawn, setting after setting.
    """
    pictures: list[Picture] = []
    for setting in sorted(path for path in kept.iterdir() if path.is_dir()):
        figures = out / setting.name
        studied = sorted(path.parent for path in setting.glob(f"*/{FILE}"))
        folders = sorted(path.parent for path in setting.glob("*/metrics.jsonl"))
        if not studied and not folders:
            continue
        figures.mkdir(parents=True, exist_ok=True)
        if studied:
            pictures += draw_gain_curves(studied[0], figures)
            continue
        # By optimizer, for one to have the same colour wherever the arms are the same.
        runs = sorted(map(read_run, folders), key=lambda run: run.optimizer)
        last = [run.folder for run in runs if run.seed in finals]
        trials = [run.folder for run in runs if run.seed not in finals]
        if not trials:
            pictures += draw_grids(read_comparison(last), figures)
            continue
        drawn = [draw_sensitivity(read_comparison(trials), figures)]
        if last:
            drawn.append(draw_learning_curves(read_comparison(last), figures, "step"))
        pictures += [picture for picture in drawn if picture is not None]
    return pictures
