"""The training loop with released gradients: the weights of the ordinary one, and its refusals."""

import json

import pytest
import torch
from tiny_training import (
    TinyModel,
    assert_same_training,
    go,
    raise_signal_at,
    tiny_run,
    weights,
    without_timings,
)

from nomadam.experiments.configuration import (
    differing_fields,
    from_json,
    override,
    short_hash,
    to_json,
)
from nomadam.experiments.estimate import estimate
from nomadam.experiments.gpt2_pretraining import demo
from nomadam.experiments.preparation import check_optimizer
from nomadam.reports import write_report
from nomadam.runs import Interrupted, RunFolder
from nomadam.terminal import estimate_lines

RELEASE = {"release_gradients": "true", "clip_norm": "none"}


def run_of(precision="fp32", **changes):
    run = tiny_run(clip_norm=None, precision=precision, model=TinyModel(width=128), **changes)
    int8 = {"optimizer.arguments.momentum_dtype": "int8"}
    return override(run, int8 if precision == "bf16" else {})


def assert_same_but_for_the_norm(ordinary, released):
    for record in (one := without_timings(ordinary)):
        assert record.pop("grad_norm") > 0
    for record in (other := without_timings(released)):
        assert record.pop("grad_norm") is None
    assert one == other
    left, right = weights(ordinary, 12), weights(released, 12)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_it_is_the_ordinary_training(tmp_path, precision, accumulation):
    run = run_of(precision, accumulation=accumulation)
    one = go(run, tmp_path / "one")
    two = go(override(run, RELEASE), tmp_path / "two")
    assert_same_but_for_the_norm(tmp_path / "one", tmp_path / "two")
    for key in ("validation_loss", "train_loss", "state_bytes", "tokens", "status"):
        assert one[key] == two[key]
    gains = [RunFolder(tmp_path / name).read_json("gains.json") for name in ("one", "two")]
    assert gains[0] == gains[1]
    assert two["optimizer_ms"] is None and two["first_optimizer_ms"] is None
    for record in RunFolder(tmp_path / "two").metrics():
        assert record["optimizer_ms"] is None and record["step_ms"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_gone_on_it_is_the_same(tmp_path, precision):
    run = override(run_of(precision, accumulation=2), RELEASE)
    go(run, tmp_path / "whole")

    def dies(record):
        if record["step"] == 7:
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        go(run, tmp_path / "parts", progress=dies)
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", progress=raise_signal_at(10, "SIGINT"))
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 12)


def test_a_report_shows_it_beside_the_ordinary(tmp_path):
    go(run_of(), tmp_path / "one")
    go(override(run_of(), RELEASE), tmp_path / "two")
    write_report([tmp_path / "one", tmp_path / "two"], tmp_path)
    assert "release_gradients=true" in (tmp_path / "report.md").read_text()


def test_what_it_would_cost():
    cost = estimate(override(run_of(), RELEASE), device="cpu")
    assert cost["step_ms"] > 0 and cost["optimizer_ms"] is None
    assert "released, one tensor at a time" in "\n".join(estimate_lines(cost))


def test_divergence_is_a_result_here_too(tmp_path):
    run = override(run_of(steps=30), {**RELEASE, "optimizer.lr": 1e30})
    result = go(run, tmp_path)
    assert result["status"] == "diverged" and result["validation_loss"] is None


def test_a_norm_to_clip_to_is_refused():
    with pytest.raises(ValueError, match=r"clip_norm = 1.0: must be none where release_gradients"):
        override(demo(), {"release_gradients": "true"})
    assert override(demo(), RELEASE).release_gradients


@pytest.mark.parametrize(
    ("optimizer", "arguments", "words"),
    [
        ("adamw", {}, "must be an SGDSaI"),
        ("sgd_sai", {"normalize": True}, "normalize=True"),
        ("sgd_sai", {"skip_nonfinite": True}, "skip_nonfinite=True"),
    ],
)
def test_what_can_not_be_released_is_refused_before_anything_is_written(
    tmp_path, optimizer, arguments, words
):
    run = override(run_of(optimizer=optimizer), {**RELEASE, "optimizer.arguments": arguments})
    with pytest.raises(ValueError, match=f"release_gradients = True: .*{words}"):
        go(run, tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        check_optimizer(run)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="release_gradients = True: must be False where processes"):
        go(override(run_of(), RELEASE), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_and_hashes_from_before_it_was_there_stay_valid():
    run = override(demo(), {"clip_norm": "none"})
    released = override(run, RELEASE)
    assert "release_gradients" not in to_json(run)
    assert from_json(to_json(run)) == run
    assert from_json(json.loads(json.dumps(to_json(released)))) == released
    assert short_hash(run) != short_hash(released)
    assert differing_fields(run, released) == {"release_gradients": ("(absent)", True)}
