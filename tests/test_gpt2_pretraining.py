"""The demonstration, made small, with every optimizer: it runs, stops, and goes on exactly."""

import pytest
import torch
from tiny_training import assert_same_training, go, raise_signal_at

from nomadam.experiments.configuration import differing_fields, override
from nomadam.experiments.gpt2_pretraining import (
    demo,
    demo_long,
    demo_prose,
    medium,
    small_openwebtext,
    xl,
)
from nomadam.optimizers.baselines import BASELINES
from nomadam.runs import Interrupted, RunFolder

SMALL = {
    "steps": "6",
    "batch_size": "2",
    "model.layers": "1",
    "model.width": "32",
    "data.vocab_size": "300",
    "data.max_bytes": "200000",
    "data.context": "16",
    "evaluation_batches": "2",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("optimizer", [n for n, row in BASELINES.items() if not row.needs_lora])
def test_it_runs_with_every_optimizer_and_goes_on_exactly(tmp_path, cache, optimizer):
    if BASELINES[optimizer].extra:
        pytest.importorskip(BASELINES[optimizer].package.split(">")[0].replace("-", "_"))
    run = override(demo(optimizer), SMALL)
    result = go(run, tmp_path / "whole", cache=cache)
    assert result["status"] == "finished"
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", cache=cache, progress=raise_signal_at(3, "SIGINT"))
    go(run, tmp_path / "parts", cache=cache)
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 6)
    module = run.model.build(vocab_size=300, context=16)
    predicted = BASELINES[optimizer].state_bytes(module, **run.optimizer.arguments)
    # What is not counted there is a step or a gain for each of the nine tensors.
    assert 0 <= result["state_bytes"] - predicted <= 9 * 16


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16"])
def test_low_precision_goes_on_exactly(tmp_path, cache, precision):
    run = override(demo("sgd_sai"), {**SMALL, "precision": precision, "model.dropout": "0.1"})
    go(run, tmp_path / "whole", cache=cache)
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", cache=cache, progress=raise_signal_at(2, "SIGTERM"))
    go(run, tmp_path / "parts", cache=cache)
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 6)


def test_the_data_are_described(tmp_path, cache):
    run = override(demo("adamw"), SMALL)
    go(run, tmp_path, cache=cache)
    described = RunFolder(tmp_path).read_json("run.json")["data"]
    assert len(described["sha256"]) == 64 and described["source"] == "stdlib"


def test_the_papers_own_size_has_its_settings():
    pytest.importorskip("transformers")
    run = small_openwebtext("adamw")
    with torch.device("meta"):
        module = run.model.build(vocab_size=50304, context=run.data.context)
    # GPT-2 small without biases: 50304 and 1024 embeddings, 12 blocks, 25 norms.
    expected = 768 * (50304 + 1024 + 12 * 12 * 768 + 25)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected
    assert run.schedule.factor(run.steps, run.steps) * run.optimizer.lr == pytest.approx(6e-5)
    assert run.schedule.factor(2000, run.steps) == 1


@pytest.mark.parametrize(("make", "millions"), [(medium, 354), (xl, 1557)])
def test_the_larger_sizes_have_the_same_settings(make, millions):
    run, small = make("adamw"), small_openwebtext("adamw")
    with torch.device("meta"):
        module = run.model.build(vocab_size=50304, context=run.data.context)
    counted = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    assert counted == pytest.approx(millions, rel=0.01)
    assert run.batch_size * run.accumulation == small.batch_size * small.accumulation == 480
    sizes = {"model.layers", "model.heads", "model.width", "batch_size", "accumulation"}
    assert differing_fields(small, run).keys() == sizes | {"name", "optimizer.lr"}


def test_the_prose_differs_from_the_demonstration_in_its_text_alone():
    changed = differing_fields(demo("adamw"), demo_prose("adamw"))
    assert changed.keys() == {"name", "data.source"}


def test_long_sequences_are_the_only_difference():
    changed = differing_fields(demo("adamw"), demo_long("adamw"))
    assert changed.keys() == {"name", "data.context", "batch_size"}
    assert changed["data.context"] == (64, 512)
    assert demo_long().batch_size * 512 == demo().batch_size * 64
