"""Pictures of what is kept for the claims."""

import pytest
from tiny_claims import GRID, SQUARES, TINY, places_in, work

from nomadam.experiments.claim_plan import SEEDS
from nomadam.reports.claim_pictures import draw_claims

pytest.importorskip("matplotlib")


def test_arms_have_curves_of_their_finals_and_rates_of_their_trials(tmp_path):
    places = places_in(tmp_path)
    work(places, TINY, GRID, SQUARES)
    (places.kept / "empty").mkdir()
    drawn = draw_claims(places.kept, SEEDS, tmp_path / "pictures")
    found = {str(picture.png.relative_to(tmp_path / "pictures")) for picture in drawn}
    assert found == {
        "short_tiny/learning_rate_sensitivity.png",
        "short_tiny/learning_curves_steps.png",
    }
    assert all(picture.png.stat().st_size > 10_000 for picture in drawn)
    curves = next(picture for picture in drawn if "curves" in picture.name)
    assert "means over the seeds" in curves.caption
