"""Grids in a report: told from scattered trials by their values, and drawn as they are."""

import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report_folders import RATES, grid_comparison, write_cell, write_grid, write_run, write_trials

from nomadam.reports import drawing, grid_figures, sensitivity_figures, spread_figures
from nomadam.reports.arms import best, read_comparison
from nomadam.reports.drawing import best_of_each, looks, named_arms
from nomadam.reports.grids import (
    grid_cells,
    measure_of,
    product_within,
    rate_decay_grids,
    spread_grids,
)
from nomadam.reports.paired import paired_differences
from nomadam.reports.reading import read_run
from nomadam.reports.sections import sections_of
from nomadam.reports.sensitivity_figures import loss_limit

FAMILIES = ("resnet18", "vgg", "mobilenet")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two optimizers, 5 rates x 3 decays, 2 seeds."""
    return read_comparison(
        write_grid(tmp_path_factory.mktemp("grid"), ("adamw", "sgd_sai"), seeds=2)
    )


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return read_comparison(write_grid(folder, ("adamw", "sgd_sai"), decays=1, families=FAMILIES))


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """What a tuning leaves: five optimizers, scattered rates and decays, finals with 5 seeds."""
    names = ("adamw", "sgd_sai", "sgdm_decoupled", "muon", "lion")
    return read_comparison(write_trials(tmp_path_factory.mktemp("trials"), names))


@pytest.fixture
def drawn(monkeypatch):
    """Figure by name: what the modules draw, kept in place of being saved."""
    figures = {}

    def keep(draw, folder, name, *, height, wide=False, **words):
        with style.context(["default", drawing.STYLE]):
            figure = Figure(figsize=(drawing.WIDE if wide else drawing.WIDTH, height))
            FigureCanvasAgg(figure)
            draw(figure)
        figures[name] = figure
        return drawing.Picture(name=name, png=folder / f"{name}.png", wide=wide, **words)

    for module in (grid_figures, spread_figures, sensitivity_figures):
        monkeypatch.setattr(module, "save", keep)
    return figures


def texts_of(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def crosses_of(axes):
    return sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "x")


def test_a_product_of_values_is_a_grid_and_scattered_values_are_none():
    whole = {(10.0**-i, 10.0**-j, "") for i in range(5) for j in range(3)}
    assert product_within(whole) == whole
    # Unfinished, and beside trials elsewhere.
    some = set(sorted(whole)[:9])
    scattered = {(0.3 + 0.01 * k, 0.7 - 0.01 * k, "") for k in range(10)}
    assert product_within(some | scattered) == some
    assert product_within(scattered) == set() == product_within(set())
    # One axis is a line, 2 x 2 cells are too few, and a ring along the diagonal is too thin.
    assert product_within({(0.1 * k, 0.5, "") for k in range(1, 12)}) == set()
    assert product_within({(r, d, "") for r in (1.0, 2.0) for d in (1.0, 2.0)}) == set()
    ring = {(float(k), float((k + step) % 12), "") for k in range(12) for step in (0, 1)}
    assert product_within(ring) == set()
    by_family = {(0.1 * k, 0.5, family) for k in range(1, 4) for family in FAMILIES}
    assert product_within(by_family) == by_family


def test_cells_are_means_over_finished_seeds(grid):
    assert measure_of(grid).key == "validation_accuracy"
    found = {one.label: one for one in rate_decay_grids(grid)}
    assert list(found) == ["adamw", "sgd_sai"]
    for optimizer, one in found.items():
        assert (len(one.rates), len(one.decays), len(one.cells)) == (5, 3, 15)
        assert one.rates == sorted(one.rates) and one.rates[2] == RATES[optimizer]
        for (rate, decay, _), arm in one.cells.items():
            assert {run.lr for run in arm.runs} == {rate} and len(arm.runs) == 2
            assert {run.configuration["optimizer.weight_decay"] for run in arm.runs} == {decay}
            kept = [
                run.result["validation_accuracy"] for run in arm.runs if run.status == "finished"
            ]
            value, _ = measure_of(grid).of(arm)
            assert (value is None) == (not kept)
            assert not kept or value == pytest.approx(100 * statistics.fmean(kept))


def test_without_an_accuracy_a_grid_is_of_losses(tmp_path):
    folders = [
        write_run(
            tmp_path / f"{i}-{j}", "sgd_sai", steps=10, layers=1, final=5 + 0.1 * i + 0.01 * j,
            changes={"optimizer": {"name": "sgd_sai", "lr": 2.0**i, "weight_decay": 10.0**j,
                                   "arguments": {}}},
        )
        for i in range(4) for j in range(5)
    ]  # fmt: skip
    comparison = read_comparison(folders)
    measure = measure_of(comparison)
    assert (measure.key, measure.rises) == ("validation_loss", False)
    (one,) = rate_decay_grids(comparison)
    heads, cells = grid_cells([one], measure, by_family=False)
    losses = [run.result["validation_loss"] for run in comparison.runs]
    assert cells[0][heads.index("cells")] == "20"
    assert cells[0][2] == f"{min(losses):.3f}" and cells[0][heads.index("worst")].startswith("5.")
    mean, sd = statistics.fmean(losses), statistics.stdev(losses)
    assert cells[0][heads.index("mean over the cells")] == f"{mean:.3f} ± {sd:.3f}"


def test_table_counts_diverged_cells_and_names_the_best(grid):
    heads, cells = grid_cells(rate_decay_grids(grid), measure_of(grid), by_family=False)
    rows = {row[0]: dict(zip(heads, row, strict=True)) for row in cells}
    assert (rows["adamw"]["diverged cells"], rows["sgd_sai"]["diverged cells"]) == ("–", "1")
    assert rows["adamw"]["at learning rate"] == "0.001" and rows["adamw"]["decay"] == "0.01"
    assert "±" in rows["adamw"]["best: final accuracy, %"]
    (section,) = [one for one in sections_of(grid, []) if one.name == "grid"]
    assert section.tables[0].cells == cells and "diverged" in section.tables[0].note


def test_heat_maps_have_every_value_one_scale_and_the_diverged(grid, drawn, tmp_path):
    pictures = grid_figures.draw_grids(grid, tmp_path)
    assert [picture.name for picture in pictures] == [
        "grid_of_rates_and_decays", "surfaces_of_rates_and_decays", "grid_in_the_paper",
    ]  # fmt: skip
    adamw, sgd_sai, bar = drawn["grid_of_rates_and_decays"].axes
    assert [axes.get_title(loc="left") for axes in (adamw, sgd_sai)] == ["adamw", "sgd_sai"]
    for axes, one in zip((adamw, sgd_sai), rate_decay_grids(grid), strict=True):
        values = {place: measure_of(grid).of(arm)[0] for place, arm in one.cells.items()}
        written = {
            (one.rates[int(t.get_position()[0])], one.decays[int(t.get_position()[1])], ""): t
            for t in axes.texts
        }
        known = {place: f"{value:.1f}" for place, value in values.items() if value is not None}
        assert {place: text.get_text() for place, text in written.items()} == known
        assert [t.get_text() for t in axes.get_xticklabels()] == [f"{r:g}" for r in one.rates]
        assert [t.get_text() for t in axes.get_yticklabels()] == [f"{d:g}" for d in one.decays]
        (frame,) = axes.patches
        winner = max(known, key=lambda place: values[place])
        assert frame.get_xy() == (one.rates.index(winner[0]), one.decays.index(winner[1]))
        for place, text in written.items():
            # Readable: text and cell differ in brightness.
            level = (
                axes.collections[0]
                .get_array()
                .reshape(3, 5)[one.decays.index(place[1]), one.rates.index(place[0])]
            )
            brightness = contrast(text.get_color(), axes.collections[0].to_rgba(level))
            assert brightness > 3, (text.get_text(), brightness)
    # Both seeds of a corner diverged, one seed of each other cell of the largest rate.
    assert crosses_of(adamw) == 0 and crosses_of(sgd_sai) == 3
    scales = {axes.collections[0].get_clim() for axes in (adamw, sgd_sai)}
    assert len(scales) == 1 and bar.get_xlabel() == "final accuracy, %"
    assert "cross" in pictures[0].caption and "mean over the finished seeds" in pictures[0].caption


def contrast(text, cell):
    """As the guidelines for accessible web pages define it: 1 to 21."""

    def luminance(color):
        parts = np.array(matplotlib.colors.to_rgb(color))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(text), luminance(cell)))
    return (high + 0.05) / (low + 0.05)


def test_surfaces_stand_side_by_side_at_the_heights_of_the_cells(grid, drawn, tmp_path):
    _, picture, _ = grid_figures.draw_grids(grid, tmp_path)
    *surfaces, _ = drawn["surfaces_of_rates_and_decays"].axes
    assert picture.wide and len(surfaces) == 2
    assert len({axes.get_zlim() for axes in surfaces}) == 1
    lowest = min(v for one in rate_decay_grids(grid) for v in values_of(one, grid))
    for axes, one in zip(surfaces, rate_decay_grids(grid), strict=True):
        dots = next(line for line in axes.lines if line.get_marker() == "o")
        heights = sorted(dots.get_data_3d()[2])
        assert heights == pytest.approx(sorted(values_of(one, grid)))
    lost = next(line for line in surfaces[1].lines if line.get_marker() == "x")
    assert np.ravel(lost.get_data_3d()).tolist() == pytest.approx([4, 2, lowest])
    x, y, fine = grid_figures._between(np.array([[0.0, 6.0], [12.0, 30.0]]))
    assert fine[0, 0] == 0 and fine[-1, -1] == 30 and fine[3, 3] == pytest.approx(12)
    assert x[0, 3] == y[3, 0] == 0.5


def values_of(one, comparison):
    found = (measure_of(comparison).of(arm)[0] for arm in one.cells.values())
    return [value for value in found if value is not None]


def test_scattered_trials_have_no_heat_map_and_points_without_lines(trials, drawn, tmp_path):
    assert rate_decay_grids(trials) == [] == spread_grids(trials)
    assert grid_figures.draw_grids(trials, tmp_path) == []
    assert spread_figures.draw_spreads(trials, tmp_path) == []
    picture = sensitivity_figures.draw_sensitivity(trials, tmp_path)
    (axes,) = drawn["learning_rate_sensitivity"].axes
    assert picture and "without a line are trials" in picture.caption
    assert all(line.get_linestyle() == "None" for line in axes.lines)
    finished = sum(arm.loss() is not None for arm in trials.arms)
    shown = [line for line in axes.lines if line.get_marker() not in ("x", "^") or line.get_alpha()]
    assert sum(len(line.get_xdata()) for line in shown) == finished


def test_two_trials_with_one_decay_by_chance_are_no_line(tmp_path, drawn):
    cells = [(1e-4, 0.3), (1e-3, 0.1), (5e-3, 0.1), (1e-2, 0.05), (3e-2, 0.2)]
    folders = [write_cell(tmp_path / f"{r}", "adamw", r, d) for r, d in cells]
    comparison = read_comparison(folders)
    assert len(comparison.families()) == 4
    sensitivity_figures.draw_sensitivity(comparison, tmp_path)
    (axes,) = drawn["learning_rate_sensitivity"].axes
    assert {line.get_linestyle() for line in axes.lines} == {"None"}
    shown = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert sorted(shown) == [rate for rate, _ in cells]


def test_a_random_arm_is_one_whatever_its_draws(tmp_path):
    runs = [(1e-3, 0), (3e-3, 0), (3e-3, 100)]
    folders = [
        write_run(tmp_path / f"{lr}-{s}", "shuffled", lr=lr, seed=s, steps=5, arguments={"seed": s})
        for lr, s in runs
    ]
    ((label, arms),) = read_comparison(folders).tuned()
    assert label == "shuffled" and len(arms) == 3


def test_trials_do_not_crowd_out_the_finals(trials):
    assert len(trials.arms) == 50 and len(best_of_each(trials)) == 5
    for arm in best_of_each(trials):
        assert len(arm.runs) == 6, "the arm with the seeds, not a lucky trial"
    assert len(trials.reference.runs) == 6
    assert [len(pair.differences) for pair in paired_differences(trials)] == [6] * 4
    sections = {section.name: section for section in sections_of(trials, [])}
    assert len(sections["results"].tables[0].cells) == 5
    assert len(sections["arms"].tables[0].cells) == 50


def test_an_arm_with_few_seeds_is_not_the_best_for_that(tmp_path):
    cells = [(1e-3, seed) for seed in range(4)] + [(2e-3, 0)]
    arms = read_comparison(
        [write_cell(tmp_path / f"{r}-{s}", "adamw", r, 1e-2, seed=s) for r, s in cells]
    ).arms
    few, many = sorted(arms, key=lambda arm: len(arm.runs))
    winner = best([few, many])
    assert winner is many
    lucky = write_run(tmp_path / "lucky", "adamw", lr=5e-3, final=0.1, steps=5)
    (alone,) = read_comparison([lucky]).arms
    assert best([many, alone]) is many and best([alone]) is alone
    assert alone.loss() < many.loss()


def test_many_optimizers_have_a_panel_each_and_seven_have_names(tmp_path, drawn):
    names = ["adamw", "sgd_sai", *(f"rival_{i}" for i in range(8))]
    comparison = read_comparison(write_trials(tmp_path, names, trials=3, seeds=1))
    named = {arm.optimizer for arm in named_arms(comparison)}
    assert len(named) == 7 and {"adamw", "sgd_sai"} <= named
    look = looks(comparison)
    strong = [look[arm.label].color for arm in named_arms(comparison)]
    assert len(set(strong)) == 7
    others = {look[arm.label] for arm in comparison.arms if arm.optimizer not in named}
    assert {one.color for one in others} == {drawing.FAINT} and all(one.faint for one in others)
    sensitivity_figures.draw_sensitivity(comparison, tmp_path)
    axes = drawn["learning_rate_sensitivity"].axes
    titles = {one.get_title(loc="left") for one in axes if one.get_visible()}
    assert titles == set(names)


def test_sensitivity_has_bands_over_seeds(tmp_path, drawn):
    cells = [(rate, seed) for rate in (1e-3, 4e-3, 1.6e-2) for seed in range(3)]
    folders = [
        write_cell(tmp_path / f"{rate}-{seed}", "sgd_sai", rate, 1e-2, seed=seed)
        for rate, seed in cells
    ]
    picture = sensitivity_figures.draw_sensitivity(read_comparison(folders), tmp_path)
    (axes,) = drawn["learning_rate_sensitivity"].axes
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    for rate in (1e-3, 4e-3, 1.6e-2):
        losses = [
            read_run(folder).result["validation_loss"]
            for folder, cell in zip(folders, cells, strict=True) if cell[0] == rate
        ]  # fmt: skip
        mean, sd = statistics.fmean(losses), statistics.stdev(losses)
        at_rate = corners[np.isclose(corners[:, 0], rate), 1]
        assert at_rate.min() == pytest.approx(mean - sd)
        assert at_rate.max() == pytest.approx(mean + sd)
    assert picture and "± one standard deviation" in picture.caption
    # With one seed at a rate there is no band, and there are whiskers where there are several.
    drawn.clear()
    sensitivity_figures.draw_sensitivity(read_comparison(folders[:-2]), tmp_path)
    (axes,) = drawn["learning_rate_sensitivity"].axes
    (whiskers,) = axes.collections
    heights = [np.ptp(path.vertices[:, 1]) for path in whiskers.get_paths() if len(path.vertices)]
    assert sum(height > 0 for height in heights) == 2


def test_sensitivity_has_a_panel_for_each_family_of_models(families, drawn, tmp_path):
    sensitivity_figures.draw_sensitivity(families, tmp_path)
    axes = drawn["learning_rate_sensitivity"].axes
    assert [one.get_title(loc="left") for one in axes] == list(FAMILIES)
    colors = [[line.get_color() for line in one.lines if len(line.get_xdata())] for one in axes]
    assert colors[0] == colors[1] == colors[2] and len(set(colors[0])) == 2


def test_a_grid_of_decays_names_its_best_line(grid, drawn, tmp_path):
    sensitivity_figures.draw_sensitivity(grid, tmp_path)
    (axes,) = drawn["learning_rate_sensitivity"].axes
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    assert len(lines) == 6 and sum(line.get_alpha() is None for line in lines) == 2
    (legend,) = drawn["learning_rate_sensitivity"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["adamw", "sgd_sai", "diverged"]


def test_an_outlier_does_not_press_the_others():
    assert loss_limit([0.5, 0.6, 0.7, 0.8]) == 0.8
    assert loss_limit([0.5, 0.6, 0.7, 0.8, 1e6]) < 2
    assert loss_limit([0.5, 0.5, 0.5, 9.0]) > 0.5 and loss_limit([0.5]) == 0.5


def test_histograms_count_every_finished_cell(grid, families, drawn, tmp_path):
    (picture,) = spread_figures.draw_spreads(grid, tmp_path)
    axes = drawn["spread_over_the_grid"].axes
    counts = [sum(bar.get_height() for bar in one.patches) for one in axes]
    assert counts == [15, 14] and "1 diverged" in axes[1].get_title(loc="left")
    assert picture.section == "grid" and "14 cells, 1 diverged" in picture.alt
    means = [one.lines[0].get_xdata()[0] for one in axes]
    expected = [statistics.fmean(values_of(one, grid)) for one in spread_grids(grid)]
    assert means == pytest.approx(expected)
    drawn.clear()
    pictures = spread_figures.draw_spreads(families, tmp_path)
    assert [one.name for one in pictures] == ["spread_over_the_grid", "spread_by_family"]
    counts = [
        sum(bar.get_height() for bar in one.patches) for one in drawn["spread_by_family"].axes
    ]
    assert counts == [5, 5, 5, 4, 4, 4], "of SGD-SaI the largest rate diverged"
    edges = {
        tuple(bar.get_x() for bar in one.patches)
        for figure in drawn.values()
        for one in figure.axes
    }
    assert len(edges) == 1, "all histograms have the same bins"
    # Rates and families alone are a grid, but none of rates and decays.
    assert rate_decay_grids(families) == [] and len(spread_grids(families)) == 2
    heads, cells = grid_cells(spread_grids(families), measure_of(families), by_family=True)
    assert [row[heads.index("family")] for row in cells] == [*FAMILIES] * 2


def test_one_row_of_rates_is_no_grid(tmp_path):
    comparison = read_comparison([grid_comparison(tmp_path, steps=20)])
    assert rate_decay_grids(comparison) == [] == spread_grids(comparison)
    assert "grid" not in {section.name for section in sections_of(comparison, [])}


def test_an_unfinished_grid_shows_what_is_there(tmp_path, drawn):
    folders = write_grid(tmp_path, ("adamw",))
    comparison = read_comparison(folders[:9])
    picture = grid_figures.draw_grids(comparison, tmp_path)[0]
    axes = drawn["grid_of_rates_and_decays"].axes[0]
    assert len(texts_of(axes)) == 9 and "not there yet" not in picture.caption
    drawn.clear()
    picture = grid_figures.draw_grids(read_comparison(folders[:8]), tmp_path)[0]
    axes = drawn["grid_of_rates_and_decays"].axes[0]
    assert len(texts_of(axes)) == 8 and "not there yet" in picture.caption


def test_the_same_grid_gives_the_same_bytes_and_no_pictures_inside(grid, tmp_path):
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pictures = [
            *grid_figures.draw_grids(grid, tmp_path / name),
            *spread_figures.draw_spreads(grid, tmp_path / name),
        ]
        files.append([path for picture in pictures for path in picture.files])
    assert len(files[0]) == 8
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    for path in map(Path, files[0]):
        if path.suffix == ".svg":
            tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
            assert "path" in tags and "image" not in tags, path.name
