"""The Trainer of transformers: its groups, what it passes, and its checkpoints."""

import subprocess
import sys

import pytest
import torch
import transformers_trainer
from safetensors.torch import load_file
from same_bits import assert_same, parameters_of
from transformers import TrainingArguments

import nomadam

PACKAGES = ("transformers", "accelerate")


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def optimizer_of(trainer):
    """Ours, which accelerate has wrapped."""
    return trainer.optimizer.optimizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer for each way to hand the optimizer over, after 20 steps."""
    folder = tmp_path_factory.mktemp("trainer")
    return {
        "named": transformers_trainer.main(folder / "named", named=True),
        "class": transformers_trainer.main(folder / "class"),
    }


@pytest.mark.parametrize("way", ["named", "class"])
def test_trains(trained, way):
    found = losses(trained[way])
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    optimizer = optimizer_of(trained[way])
    assert len(optimizer.gains()) == len(parameters_of(trained[way].model))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [2e-2, 0.0]


def test_the_trainer_groups_as_decay_groups_and_passes_no_names(trained):
    """So gains have the place of the parameter as their key, and are otherwise the same."""
    named, unnamed = optimizer_of(trained["named"]), optimizer_of(trained["class"])
    assert [len(group["params"]) for group in unnamed.param_groups] == [10, 18]
    assert list(unnamed.gains()) == list(range(28))
    assert "transformer.h.0.attn.c_attn.weight" in named.gains()
    assert list(unnamed.gains().values()) == list(named.gains().values())
    theirs, ours = (parameters_of(trained[way].model) for way in ("class", "named"))
    assert_same(theirs, ours)


def gains_of_a_plain_loop(samples):
    """After one step on all samples."""
    model = transformers_trainer.model_of()
    optimizer = nomadam.SGDSaI(model.named_parameters())
    batch = torch.stack([x["input_ids"] for x in transformers_trainer.dataset_of(samples)])
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    return optimizer.gains()


def test_gains_are_those_of_a_plain_loop(tmp_path):
    """Over an accumulated batch, clipped, in a first step whose learning rate is 0."""
    trainer = transformers_trainer.main(tmp_path, steps=1, samples=16, named=True)
    assert optimizer_of(trainer).gains() == pytest.approx(gains_of_a_plain_loop(16), rel=1e-4)


def test_sharded_over_two_processes_trains_as_one(tmp_path, monkeypatch):
    """Each takes two of the four batches of a step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--steps", "10", "--named", "--folder", str(tmp_path / "two")]
    command = [*torchrun, "--nproc-per-node", "2", transformers_trainer.__file__, *options]
    subprocess.run(command, check=True, capture_output=True)
    folder = tmp_path / "two" / "checkpoint-10"
    saved, model = torch.load(folder / "optimizer.pt"), load_file(folder / "model.safetensors")
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    gains = {name: float(saved["state"][i]["gsnr"]) for i, name in enumerate(names)}

    def twice_as_many(folder, **settings):
        settings["gradient_accumulation_steps"] *= 2
        return TrainingArguments(folder, **settings)

    monkeypatch.setattr(transformers_trainer, "TrainingArguments", twice_as_many)
    alone = transformers_trainer.main(tmp_path / "one", steps=10, named=True)
    assert losses(alone)[-1] < losses(alone)[0] - 0.1
    assert gains == pytest.approx(optimizer_of(alone).gains(), rel=1e-4)
    for name, param in parameters_of(alone.model).items():
        torch.testing.assert_close(model[name], param, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["named", "class"])
def test_resumes_with_the_same_bits(trained, way, tmp_path):
    whole = trained[way]
    saved = f"{whole.args.output_dir}/checkpoint-10"
    resumed = transformers_trainer.main(tmp_path, named=way == "named", resume=saved)
    assert losses(resumed)[10:] == losses(whole)[10:]
    assert_same(parameters_of(resumed.model), parameters_of(whole.model))
    assert optimizer_of(resumed).gains() == optimizer_of(whole).gains()
    assert_same(optimizer_of(resumed).state_dict(), optimizer_of(whole).state_dict())
