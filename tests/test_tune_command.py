import pytest
from tiny_tunings import DECAY, HERE, LR, TuneHere

from nomadam.cli import main
from nomadam.experiments import tuning
from nomadam.experiments.comparison import train_arm
from nomadam.tune_command import edge_note, ranges_of, show_tuning


@pytest.fixture
def tune_here(monkeypatch, tmp_path):
    return TuneHere(monkeypatch, tmp_path / "out")


def test_ranges_in_words():
    assert ranges_of(["lr=1e-3,1", "adamw.eps=1e-9,1e-6"]) == {
        "lr": (1e-3, 1.0),
        "adamw.eps": (1e-9, 1e-6),
    }
    for text in ("lr", "lr=1", "lr=1,2,3", "lr=low,high"):
        with pytest.raises(ValueError, match="FIELD=LOW,HIGH"):
            ranges_of([text])


def searched(best, edge, space=(1e-3, 1e-1), *, is_grid=False):
    """What of a search's summary an edge is told from."""
    search = {"label": "adamw", "is_grid": is_grid, "space": {LR: list(space)}}
    return {**search, "best": {"values": {LR: best}}, "edges": {LR: edge}}


class TestEdges:
    @pytest.mark.parametrize(
        ("best", "edge", "wider"), [(1.2e-3, "lower", "0.0001,0.1"), (9e-2, "upper", "0.001,1")]
    )
    def test_a_best_value_in_the_outer_part_of_its_range(self, best, edge, wider):
        note = edge_note(searched(best, edge), LR)
        assert f"the best lr {best:g} lies at the {edge} edge of its range, 0.001 to 0.1" in note
        assert note.endswith(f"widen it (--range adamw.lr={wider})")

    @pytest.mark.parametrize(("edge", "beyond"), [("lower", "below"), ("upper", "above")])
    def test_a_best_value_within_its_range_beyond_which_none_was_tried(self, edge, beyond):
        note = edge_note(searched(1e-2, edge), LR)
        assert note.startswith(f"adamw: no lr {beyond} the best one, 0.01, was tried in 0.001 to")
        assert "take more trials" in note and "widen" not in note and "--range" not in note

    def test_of_a_grid(self):
        cells = (1e-3, 1e-2, 1e-1, "(absent)")
        note = edge_note(searched(1e-1, "upper", cells, is_grid=True), LR)
        assert note == "adamw: the best lr 0.1 lies at the upper edge of the grid: widen it"
        # Those beyond it have failed.
        note = edge_note(searched(1e-2, "upper", cells, is_grid=True), LR)
        assert "no lr above the best one" in note and note.endswith("take more trials")

    def test_two_trials_with_the_best_in_the_middle_ask_for_more(self, tune_here, capsys):
        # The loss of so short a training falls with the rate.
        found, _ = tune_here(optimizers=["adamw"], budget=2, overrides={DECAY: "0"})
        (search,) = found["searches"]
        assert search["best"]["trial"] == 0 and search["edges"] == {LR: "upper"}
        show_tuning(found)
        told = capsys.readouterr().out
        assert "adamw: no lr above the best one" in told and "widen" not in told


def test_what_failed_in_an_earlier_command_is_no_failure_of_this_one(tune_here, monkeypatch):
    def broken(arm, options, make_progress):
        raise RuntimeError("out of memory")

    words = ["tune", f"{HERE}.study", "--budget", "1", "--device", "cpu"]
    words += ["--out", str(tune_here.folder)]
    monkeypatch.setattr(tuning, "train_arm", broken)
    assert main([*words, "--optimizer", "adamw"]) == 1
    monkeypatch.setattr(tuning, "train_arm", train_arm)
    assert main([*words, "--optimizer", "sgd_sai"]) == 0
