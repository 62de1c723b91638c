"""The study of low precision: its arms, seeds and names, and that each arm is what it says."""

import pytest
import torch
from tiny_training import go

from nomadam.experiments import gpt2_pretraining, low_precision, vit_classification
from nomadam.experiments.comparison import plan_comparison
from nomadam.experiments.configuration import differing_fields, override
from nomadam.runs import RunFolder

STUDIES = {
    "gpt2_demo": gpt2_pretraining.demo,
    "gpt2_demo_roundings": gpt2_pretraining.demo,
    "vit_demo": vit_classification.demo,
}
FIELDS = {
    "name",
    "seed",
    "precision",
    "optimizer.arguments.momentum_dtype",
    "optimizer.arguments.rounding",
}
studies = pytest.mark.parametrize("study", STUDIES)


@studies
def test_every_arm_is_the_demonstration_but_for_its_precision(study):
    runs, base = getattr(low_precision, study)(), STUDIES[study]("sgd_sai")
    if study == "vit_demo":
        base = override(base, {"optimizer.lr": low_precision.VIT_LEARNING_RATE})
    for run in runs:
        assert set(differing_fields(base, run)) <= FIELDS
    reference = {"name"} if study != "gpt2_demo_roundings" else FIELDS - {"seed"}
    assert set(differing_fields(base, runs[0])) == reference


@studies
def test_each_arm_has_the_same_seeds_and_the_reference_comes_first(study):
    planned = plan_comparison(f"low_precision.{study}")
    references = {"gpt2_demo_roundings": "sgd_sai rounding=stochastic"}
    reference = references.get(study, "sgd_sai precision=fp32")
    assert planned.reference == planned.labels[0] == reference
    seeds = {label: [] for label in planned.labels}
    for arm in planned.arms:
        seeds[arm.label].append(arm.run.seed)
    shapes = {"gpt2_demo": (4, 12), "gpt2_demo_roundings": (3, 5), "vit_demo": (4, 20)}
    num_arms, num_seeds = shapes[study]
    assert len(seeds) == num_arms
    assert all(found == list(range(num_seeds)) for found in seeds.values())
    assert len({arm.folder for arm in planned.arms}) == num_arms * num_seeds
    # All arms of a seed come together.
    assert [arm.run.seed for arm in planned.arms] == sorted(arm.run.seed for arm in planned.arms)


def test_one_seed_of_it_has_the_folders_of_the_whole():
    whole = {arm.folder for arm in plan_comparison("low_precision.vit_demo").arms}
    parts = [
        plan_comparison("low_precision.vit_demo", overrides={"seed": str(seed)}).arms
        for seed in range(20)
    ]
    assert {arm.folder for arms in parts for arm in arms} == whole


@pytest.mark.parametrize("changes", low_precision.ARMS + low_precision.ROUNDINGS[1:])
def test_each_arm_trains_with_the_state_that_it_names(tmp_path, changes):
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    run = override(vit_classification.demo("sgd_sai"), changes)
    small = {"steps": 3, "batch_size": 4, "evaluation_batches": 1, "model.layers": 1}
    run = override(run, small)
    result = go(run, tmp_path)
    assert result["status"] == "finished"
    (checkpoint,) = RunFolder(tmp_path).checkpoints.iterdir()
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    blocks = [
        state for state in saved["state"].values() if state["momentum_buffer"].numel() >= 4096
    ]
    asked = run.optimizer.arguments.get("momentum_dtype", "float32")
    assert blocks and {state["momentum_buffer"].dtype for state in blocks} == {
        getattr(torch, asked)
    }
    kahan = run.optimizer.arguments.get("rounding") == "kahan"
    assert all(("compensation" in state) == kahan for state in blocks)
    assert all(("momentum_scale" in state) == (asked == "int8") for state in blocks)
