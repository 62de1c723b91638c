import pytest
from tiny_tunings import DECAY, LR, TuneHere

from nomadam.tune_command import edge_note, ranges_of


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


class TestEdges:
    def test_a_best_value_at_an_edge_asks_for_more(self, tune_here):
        # The loss of so short a training falls with the rate.
        found, _ = tune_here(optimizers=["adamw"], budget=5, overrides={DECAY: "0"})
        search = found["searches"][0]
        assert search["edges"] == {LR: "upper"}
        note = edge_note(search, LR)
        assert note.startswith("adamw: the best lr ")
        assert "at the upper edge of what was tried, in 3e-05 to 0.03: widen it" in note
        assert "(--range adamw.lr=3e-05,0.3)" in note
