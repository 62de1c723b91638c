"""The paper's numbers beside ours, and the pictures of samples."""

import ast
import base64
import re
import struct
import sys
import zlib
from pathlib import Path

import pytest
from report_folders import demo_comparison, write_cell, write_grid, write_run

from nomadam.reports import published, summary_rows, write_report
from nomadam.reports.arms import read_comparison
from nomadam.reports.paper_tables import paper_sections
from nomadam.reports.png_files import read_png
from nomadam.reports.published import GRIDS, TABLES, table_of
from nomadam.reports.samples import MOST_PICTURES
from nomadam.reports.sections import sections_of
from nomadam.reports.tables import summary_cells


def rows_by_name(section):
    return {row[0]: dict(zip(section.heads, row, strict=True)) for row in section.cells}


def test_published_numbers_fill_their_tables_and_agree_with_each_other():
    assert len(TABLES) == 6
    for table in TABLES.values():
        for _, numbers in table.rows.values():
            assert len(numbers) == len(table.columns), table.title
        assert bool(table.rows) == bool(table.columns) == bool(table.ours)
    for study, grid in GRIDS.items():
        assert list(grid.rates) == sorted(grid.rates)
        assert list(grid.decays) == sorted(grid.decays)
        best = {name: numbers[0] for name, numbers in TABLES[study].rows.values()}
        for name, cells in grid.cells.items():
            assert len(cells) == len(grid.decays)
            assert {len(row) for row in cells} == {len(grid.rates)}
            # The figure's best cell is the table's best number, but for rounding.
            told = best[name][0] if isinstance(best[name], tuple) else best[name]
            assert max(map(max, cells)) == pytest.approx(told, abs=0.011)
    ridge = GRIDS["resnet18_grid"]
    products = [
        rate * decay
        for decay, row in zip(ridge.decays, ridge.cells["SGD-SaI"], strict=True)
        for rate, value in zip(ridge.rates, row, strict=True)
        if value > 94.5
    ]
    assert products == pytest.approx([5e-4] * 3)


def test_published_numbers_need_the_standard_library_alone():
    tree = ast.parse(Path(published.__file__).read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert names and {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_a_study_is_told_by_the_beginning_of_its_name():
    assert table_of("vit_classification.demo") is TABLES["vit_classification"]
    assert table_of("resnet18_grid.demo_grid") is TABLES["resnet18_grid"]
    assert table_of("resnet18_grid.families_grid") is TABLES["resnet18_grid.families"]
    assert table_of("low_precision.vit_demo") is None and table_of("") is None


def test_gpt2_stands_beside_the_paper(tmp_path):
    comparison = read_comparison([demo_comparison(tmp_path, seeds=2)])
    (section,) = paper_sections(comparison)
    rows = rows_by_name(section)
    assert list(rows) == ["AdamW", "Adam-mini", "SGD-SaI", "sgdm"]
    assert rows["SGD-SaI"]["paper: validation loss"] == "3.09"
    assert rows["AdamW"]["paper: optimizer step, ms"] == "13.42"
    ours = {arm.label: arm for arm in comparison.arms}
    assert rows["SGD-SaI"]["ours: validation loss"].startswith(f"{ours['sgd_sai'].loss():.3f} ±")
    assert rows["SGD-SaI"]["ours: state of AdamW's, %"] == "50.0"
    assert rows["Adam-mini"]["our arm"] == rows["Adam-mini"]["ours: validation loss"] == "–"
    assert rows["sgdm"]["paper: validation loss"] == "–" != rows["sgdm"]["ours: validation loss"]
    for words in (
        "arXiv 2412.11768",
        "OpenWebText",
        "gpt2_pretraining.demo",
        "on stdlib",
        "can not",
    ):
        assert words in section.note
    (shown,) = [one for one in sections_of(comparison, []) if one.name == "paper"]
    assert shown.tables[0].cells == section.cells


def test_a_variant_does_not_stand_for_the_method_of_the_paper(tmp_path):
    folders = [
        write_run(tmp_path / "a", "sgd_sai", steps=5, arguments={"gain": "sqrt_numel"}, final=1.0),
        write_run(tmp_path / "b", "sgd_sai", steps=5, final=5.0),
        write_run(tmp_path / "c", "adamw", steps=5, diverges_at=4),
    ]
    (section,) = paper_sections(read_comparison(folders))
    rows = rows_by_name(section)
    assert rows["SGD-SaI"]["our arm"] == "sgd_sai gain=–"
    assert "sqrt_numel" in rows["sgd_sai"]["our arm"]
    # What diverged has no number to stand there.
    assert rows["AdamW"]["our arm"] == "–"


def test_grids_stand_beside_the_paper_with_their_mean(tmp_path):
    folders = write_grid(tmp_path / "grid", ("adamw", "sgd_sai"))
    comparison = read_comparison(folders)
    (section,) = paper_sections(comparison)
    rows = rows_by_name(section)
    accuracies = [
        100 * run.result["validation_accuracy"]
        for run in comparison.runs
        if run.optimizer == "adamw"
    ]
    mean = f"{sum(accuracies) / len(accuracies):.2f} ±"
    assert rows["AdamW"]["ours: mean over the grid, %"].startswith(mean)
    assert rows["AdamW"]["paper: best top-1, %"] == "94.74"
    assert rows["Adam"]["ours: top-1, %"] == "–"
    name = "vit_classification.demo"
    alone = [write_cell(tmp_path / "alone", "adamw", 1e-3, 1e-2, name=name)]
    (section,) = paper_sections(read_comparison(alone))
    assert rows_by_name(section)["SGDM"]["paper: mean over the grid, %"] == "14.33 ± 19.38"
    assert "ours: mean over the grid, %" not in section.heads, "one cell is no grid"


def test_families_and_diffusion_have_words_alone_and_other_studies_nothing(tmp_path):
    name = "resnet18_grid.families_grid"
    folder = write_cell(tmp_path / "a", "adamw", 1e-3, 1e-2, family="vgg", name=name)
    (section,) = paper_sections(read_comparison([folder]))
    assert section.heads == [] == section.cells and "NATS-Bench" in section.note
    folder = write_run(tmp_path / "b", steps=5, changes={"name": "diffusion.demo"})
    out = write_report([folder], tmp_path / "out")
    for path in out[:2]:
        text = path.read_text()
        assert "In the paper" in text and "Mix-of-Show" in text
    folder = write_run(tmp_path / "c", steps=5, changes={"name": "low_precision.gpt2_demo"})
    assert paper_sections(read_comparison([folder])) == []


def test_scores_of_texts_and_samples_have_columns(tmp_path):
    scores = {"bleu": 12.345, "rouge_l": 40.0, "judged_texts": 64, "recognised": 0.875,
              "frechet_distance": 3.2}  # fmt: skip
    name = "lora_finetuning.demo"
    folders = [
        write_run(tmp_path / "a", "adamw", steps=5, changes={"name": name}, result=scores),
        write_run(tmp_path / "b", "sgd_sai", steps=5, changes={"name": name},
                  result={**scores, "judged_texts": 1}),
    ]  # fmt: skip
    many, one = rows = summary_rows(folders)
    assert (many["bleu"], many["frechet_distance"], many["bleu_sd"]) == (12.345, 3.2, None)
    assert one["bleu"] is None, "one text is no measure"
    heads, cells = summary_cells(rows)
    found = dict(zip(heads, cells[0], strict=True))
    assert (found["BLEU"], found["ROUGE-L"], found["samples recognised, %"]) == (
        "12.3", "40.0", "87.5",
    )  # fmt: skip
    (section,) = paper_sections(read_comparison(folders))
    assert rows_by_name(section)["SGD-SaI"]["paper: BLEU"] == "69.9"
    assert rows_by_name(section)["AdamW"]["ours: BLEU"] == "12.3"


# Pictures of samples.


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(width=4, height=3, *, level=200, extra=b""):
    rows = b"".join(b"\0" + bytes([level]) * width for _ in range(height))
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"".join((
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", size), extra,
        chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""),
    ))  # fmt: skip


TEXT = chunk(b"tEXt", b"path\0/home/someone<script>")


def write_samples(folder, optimizer, content, **options):
    write_run(folder, optimizer, steps=5, changes={"name": "diffusion.demo"}, **options)
    (folder / "samples.png").write_bytes(content)
    return folder


def test_samples_are_shown_and_linked(tmp_path):
    pictures = {name: png(level=40 * i, extra=TEXT) for i, name in enumerate(("adamw", "sgd_sai"))}
    scores = {"recognised": 0.5, "frechet_distance": 2.0}
    folders = [write_samples(tmp_path / n, n, pictures[n], result=scores) for n in pictures]
    folders.append(write_run(tmp_path / "none", "sgdm", steps=5))
    paths = write_report(folders, tmp_path / "out")
    written = [path for path in paths if path.name.startswith("samples_")]
    assert [path.name for path in written] == ["samples_1.png", "samples_2.png"]
    page, text = paths[1].read_text(), paths[0].read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(one) for one in embedded] == [p.read_bytes() for p in written]
    # The pixels as they were, and nothing of the texts beside them.
    assert written[0].read_bytes() == png(level=0) and written[1].read_bytes() == png(level=40)
    for index, name in enumerate(pictures, start=1):
        assert f"](figures/samples_{index}.png)" in text and f"Samples of {name}. " in text
    assert "samples recognised, %: 50.0; Fréchet distance: 2.00" in page
    assert text.index("## Samples") < text.index("## Memory and time")
    again = write_report(folders, tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is no PNG"),
        (b"<svg onload=alert(1)>", "is no PNG"),
        (png()[:-20], "torn or damaged"),
        (png()[:8], "torn or damaged"),
        (png().replace(b"IDAT", b"IDAX"), "torn or damaged"),
        (png()[:8] + chunk(b"IDAT", b"x") + png()[8:], "does not begin with its size"),
        (png(20_000, 1), "20000 x 1 pixels"),
        (png() + b"\0" * 8_000_000, "should have at most 8,000,000"),
    ],
)
def test_what_is_no_whole_picture_is_left_out_and_noted(tmp_path, content, why):
    folder = write_samples(tmp_path / "run", "adamw", content)
    with pytest.raises(ValueError, match=why):
        read_png(folder / "samples.png")
    comparison = read_comparison([folder])
    assert not comparison.runs[0].has_samples
    assert any("samples.png" in note and why in note for note in comparison.notes)


def test_a_folder_in_the_place_of_the_picture_is_noted(tmp_path):
    folder = write_run(tmp_path / "run", steps=5)
    (folder / "samples.png").mkdir()
    comparison = read_comparison([folder])
    assert not comparison.runs[0].has_samples
    assert any("samples.png" in note for note in comparison.notes)


def test_of_many_runs_the_best_show_their_samples(tmp_path):
    names = [f"optimizer_{i:02}" for i in range(MOST_PICTURES + 2)]
    folders = [
        write_samples(tmp_path / f"{name}-{trial}", name, png(level=trial), lr=10.0**-trial,
                      final=5.0 - trial)
        for name in names for trial in range(2)
    ]  # fmt: skip
    from nomadam.reports.samples import show_samples

    (tmp_path / "out").mkdir()
    pictures = show_samples(read_comparison(folders), tmp_path / "out")
    assert len(pictures) == MOST_PICTURES
    assert {picture.png.read_bytes() for picture in pictures} == {png(level=1)}
