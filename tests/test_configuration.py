"""Runs as JSON, their hash and overrides, and the learning rate over the steps."""

import json
import math
import sys

import pytest
from tiny_training import tiny_run

from nomadam.experiments.configuration import (
    OptimizerChoice,
    Run,
    differing_fields,
    from_json,
    override,
    short_hash,
    to_json,
)
from nomadam.experiments.data import byte_pairs
from nomadam.experiments.gpt2_pretraining import demo, demo_learning_rates, small_openwebtext
from nomadam.experiments.language_model import GPT2Model, TokenData
from nomadam.experiments.schedule import Schedule


def language_run(**changes):
    fields = {
        "name": "somewhere.made",
        "model": GPT2Model(layers=2, heads=2, width=8),
        "data": TokenData(),
        "optimizer": OptimizerChoice(name="adamw", lr=1e-3, arguments={"beta2": 0.95}),
        "steps": 10,
        "batch_size": 4,
    }
    return Run(**{**fields, **changes})


@pytest.mark.parametrize(
    "run", [language_run(), demo("adamw"), small_openwebtext(), *demo_learning_rates()[:2]]
)
def test_a_run_comes_back_from_json(run):
    written = json.dumps(to_json(run), allow_nan=False)
    assert from_json(json.loads(written)) == run
    assert short_hash(from_json(json.loads(written))) == short_hash(run)


def test_equal_settings_have_one_hash_and_different_ones_another():
    one = language_run(clip_norm=1, schedule=Schedule(name="step", milestones=[5, 8]))
    other = language_run(clip_norm=1.0, schedule=Schedule(name="step", milestones=(5.0, 8.0)))
    assert one == other and short_hash(one) == short_hash(other)
    ordered = OptimizerChoice(name="sgd_sai", lr=1, arguments={"eps": 0.0, "gain": "gsnr"})
    turned = OptimizerChoice(name="sgd_sai", lr=1, arguments={"gain": "gsnr", "eps": 0.0})
    assert short_hash(language_run(optimizer=ordered)) == short_hash(language_run(optimizer=turned))
    for field, value in (("seed", 1), ("precision", "bf16"), ("accumulation", 2)):
        assert short_hash(override(one, {field: value})) != short_hash(one)


def test_hash_is_stable_over_processes_and_versions():
    # Folders are found again by it: where it changes, trainings begun before can not go on.
    assert short_hash(language_run()) == "673eb6fe"


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.lr", "1", 1.0),
        ("steps", "1_000", 1000),
        ("clip_norm", "none", None),
        ("evaluation_batches", "7", 7),
        ("model.bias", "True", True),
        ("schedule.warmup_steps", "0", 0),
        ("precision", "bf16", "bf16"),
        ("data.source", "none", "none"),
        ("data.source", "/a=b, c", "/a=b, c"),
        ("optimizer.arguments.beta2", "0.5", 0.5),
        ("optimizer.arguments.fused", "true", True),
        ("optimizer.arguments.gain", "sqrt_numel", "sqrt_numel"),
        ("optimizer.arguments", '{"eps": 1e-8}', {"eps": 1e-8}),
    ],
)
def test_override_reads_text_by_type(field, text, value):
    run = language_run()
    held = override(run, {field: text})
    for name in field.split("."):
        held = held[name] if isinstance(held, dict) else getattr(held, name)
    assert held == value and type(held) is type(value)
    assert run == language_run()


def test_overrides_are_checked_together():
    run = override(language_run(), {"model.width": "9", "model.heads": "3"})
    assert (run.model.width, run.model.heads) == (9, 3)
    changes = {"schedule.milestones": "0.4, 0.8", "schedule.name": "step"}
    assert override(run, changes).schedule.milestones == (0.4, 0.8)
    assert override(run, {"optimizer.arguments.eps": "1"}).optimizer.arguments == {
        "beta2": 0.95,
        "eps": 1,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": "1"}, "unknown field 'learning_rate'"),
        ({"lr": "1"}, "nearest: optimizer.lr"),
        ({"optimizer.weightdecay": "1"}, "nearest: optimizer.weight_decay"),
        ({"model": "x"}, "unknown field 'model'"),
        ({"optimizer.lr.x": "1"}, "unknown field"),
        ({"optimizer.arguments.a.b": "1"}, "unknown field"),
        ({"": "1"}, "unknown field ''"),
        ({"steps": "6.5"}, "steps = '6.5': must be an integer"),
        ({"steps": "0"}, "steps = 0: must be at least 1"),
        ({"steps": 6.0}, "steps = 6.0: must be an integer"),
        ({"steps": True}, "steps = True: must be an integer"),
        ({"steps": None}, "steps = None: must be an integer"),
        ({"optimizer.lr": "fast"}, "optimizer.lr = 'fast': must be a finite number"),
        ({"optimizer.lr": "inf"}, "must be a finite number"),
        ({"optimizer.lr": "-1"}, "optimizer.lr = -1.0: must be at least 0"),
        ({"model.bias": "1"}, "model.bias = '1': must be true or false"),
        ({"precision": "fp8"}, "one of fp32, bf16_autocast, bf16"),
        ({"clip_norm": "0"}, "clip_norm = 0.0: must be above 0, or none"),
        ({"model.width": "7"}, "a multiple of model.heads = 2"),
        ({"model.dropout": "1"}, "model.dropout"),
        ({"seed": "-1"}, "seed = -1"),
        ({"seed": str(2**32)}, "seed ="),
        ({"name": "other.run"}, "name = 'other.run'"),
        ({"optimizer.arguments": "{"}, "optimizer.arguments"),
        ({"optimizer.arguments": '{"a": [1]}'}, "optimizer.arguments"),
        ({"optimizer.arguments.eps": float("nan")}, "optimizer.arguments"),
        ({"schedule.milestones": "0.5"}, "schedule.milestones"),
        ({"schedule.name": "step", "schedule.milestones": "0.5,3"}, "schedule.milestones"),
        ({"schedule.name": "step", "schedule.milestones": "8,5"}, "ascending"),
        ({"schedule.name": "step"}, "schedule.milestones"),
        ({"schedule.warmup_fraction": "1.1"}, "from 0 to 1"),
        ({"schedule.decay_factor": "0"}, "above 0 and at most 1"),
        ({"data.vocab_size": "10"}, "from 257 to 1048576"),
        ({"data.vocab_size": str(2**20 + 1)}, "from 257 to 1048576"),
        ({"data.validation_fraction": "0.51"}, "above 0 and at most 0.5"),
        ({"data.validation_fraction": "0"}, "above 0 and at most 0.5"),
    ],
)
def test_override_refuses(changes, words):
    with pytest.raises(ValueError) as caught:
        override(language_run(), changes)
    assert words in str(caught.value)


def test_the_ranges_of_the_data_are_those_of_its_loader():
    ends = {"data.vocab_size": byte_pairs.LARGEST_VOCABULARY, "data.validation_fraction": 0.5}
    changed = override(language_run(), ends).data
    assert changed.vocab_size == 2**20 and byte_pairs.SMALLEST_VOCABULARY == 257


def test_differing_fields_reach_into_the_tree():
    run = language_run()
    other = override(run, {"optimizer.arguments.beta2": "0.9", "model.layers": "3"})
    assert differing_fields(run, other) == {
        "model.layers": (2, 3),
        "optimizer.arguments.beta2": (0.95, 0.9),
    }
    bare = override(run, {"optimizer.arguments": "{}"})
    assert differing_fields(run, bare) == {"optimizer.arguments.beta2": (0.95, "(absent)")}
    assert differing_fields(run, to_json(run)) == {}


def changed(path, value):
    values = to_json(language_run())
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return values


@pytest.mark.parametrize(
    "values",
    [
        changed(["model", "class"], "subprocess.Popen"),
        changed(["model", "class"], "nomadam.experiments.language_model.Path"),
        changed(["model", "class"], "nomadam.experiments.language_model.check_types"),
        changed(["model", "class"], "nomadam.experiments.configuration.Schedule"),
        changed(["model", "class"], "nomadam.experiments.schedule.Schedule"),
        changed(["model", "class"], "nomadam.experiments.no_such_file.Model"),
        changed(["model", "class"], "nomadam.experiments...language_model.GPT2Model"),
        changed(["model", "class"], "nomadam.optimizers.sgd_sai.SGDSaI"),
        changed(["model", "class"], "this.Zen"),
        changed(["model", "class"], None),
        changed(["model", "class"], ["nomadam"]),
        changed(["model"], "nomadam.experiments.language_model.GPT2Model"),
        changed(["model", "layers"], "2"),
        changed(["model", "layers"], [2]),
        changed(["model", "__class__"], "x"),
        changed(["optimizer", "lr"], "1e-3"),
        changed(["optimizer", "lr"], float("nan")),
        changed(["optimizer"], []),
        changed(["schedule", "milestones"], {"0": 1}),
        changed(["steps"], True),
        changed(["name"], "os.system('x')"),
        changed(["extra"], 1),
        {key: value for key, value in to_json(language_run()).items() if key != "steps"},
        to_json(tiny_run()),
        [],
        None,
        "{}",
    ],
)
def test_json_that_is_no_run_of_ours_is_refused(values):
    before = set(sys.modules)
    with pytest.raises(ValueError):
        from_json(values)
    assert "this" not in set(sys.modules) - before


STEPS = 40
SCHEDULES = {
    "cosine": Schedule(name="cosine", final_fraction=0.1),
    "linear": Schedule(name="linear", final_fraction=0.1),
    "constant": Schedule(name="constant"),
    "step": Schedule(name="step", milestones=(0.5, 0.75)),
    "warmup_stable_decay": Schedule(name="warmup_stable_decay", final_fraction=0.1),
}
# Factor at steps 1, 4 (end of warm-up), 5, 22 (middle of the decay), 32, 33, 40.
EXPECTED = {
    "cosine": (0.25, 1, 0.998287, 0.55, 0.2052800, 0.1813816, 0.1),
    "linear": (0.25, 1, 0.975, 0.55, 0.3, 0.275, 0.1),
    "constant": (0.25, 1, 1, 1, 1, 1, 1),
    "step": (0.25, 1, 1, 0.1, 0.01, 0.01, 0.01),
    "warmup_stable_decay": (0.25, 1, 1, 1, 1, 0.8875, 0.1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_at_its_ends_and_between(name):
    factors = [SCHEDULES[name].factor(step, STEPS) for step in (1, 4, 5, 22, 32, 33, 40)]
    assert factors == pytest.approx(EXPECTED[name], abs=1e-6)
    if name != "step" and name != "constant":
        assert factors[-1] == 0.1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 2, 1001])
def test_schedule_stays_between_0_and_1(name, steps, warmup):
    values = {**vars(SCHEDULES[name]), "warmup_fraction": 0.0, "warmup_steps": warmup}
    schedule = Schedule(**values)
    factors = [schedule.factor(step, steps) for step in range(1, steps + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising = factors[: min(warmup, steps)]
    assert rising == sorted(rising) and factors[len(rising) :] == sorted(
        factors[len(rising) :], reverse=True
    )


@pytest.mark.parametrize("step", [0, -1, 41])
def test_a_step_outside_the_training_is_refused(step):
    with pytest.raises(ValueError, match="from 1 to 40"):
        Schedule().factor(step, 40)


def test_milestones_in_steps_are_those_in_fractions():
    fractions = Schedule(name="step", milestones=(0.29, 0.58), warmup_steps=0)
    steps = Schedule(name="step", milestones=(29, 58), warmup_steps=0)
    factors = [[each.factor(t, 100) for t in range(1, 101)] for each in (fractions, steps)]
    assert factors[0] == factors[1]
    assert factors[0][28] == 1 and math.isclose(factors[0][29], 0.1)


def test_the_grid_gives_each_optimizer_as_many_rates():
    grid = demo_learning_rates()
    counts = {run.optimizer.name: 0 for run in grid}
    for run in grid:
        counts[run.optimizer.name] += 1
    assert set(counts) == {"adamw", "sgdm", "sgd_sai"} and len(set(counts.values())) == 1
    assert len({short_hash(run) for run in grid}) == len(grid)


def test_every_optimizer_has_a_demonstration():
    from nomadam.optimizers.baselines import BASELINES

    for name, row in BASELINES.items():
        assert demo(name).schedule.name == row.schedule
    with pytest.raises(ValueError, match="adamw"):
        demo("adamww")
