"""LoRA factors of peft: the A of a pair has no gradient before its B has left zero."""

import peft_lora
import pytest
import torch
from as_script import printed_by
from same_bits import assert_same, parameters_of

PACKAGES = ("peft", "transformers", "accelerate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return peft_lora.with_trainer(tmp_path_factory.mktemp("peft"))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trains(tmp_path):
    model, optimizer, found = peft_lora.main(20, tmp_path / "factors.pt")
    assert found[-1] < found[0] - 0.5
    assert optimizer.gains().keys() == parameters_of(model).keys()


def test_trains_under_the_trainer(trained):
    assert losses(trained)[-1] < losses(trained)[0] - 0.5
    gains = trained.optimizer.optimizer.gains()
    assert sorted(gains) == list(range(len(parameters_of(trained.model))))


def test_each_factor_gets_its_gain_when_it_starts_to_learn(tmp_path):
    model, optimizer, _ = peft_lora.main(1, tmp_path / "factors.pt")
    names = parameters_of(model).keys()
    assert optimizer.gains().keys() == {name for name in names if "lora_B" in name}
    first = optimizer.gains()
    _, optimizer, _ = peft_lora.main(2, tmp_path / "factors.pt")
    assert optimizer.gains().keys() == names
    assert {name: optimizer.gains()[name] for name in first} == first
    assert all(gain > 1.5 for gain in optimizer.gains().values())  # A's are no gains of noise


def test_asked_for_fewer_steps_the_checkpoint_stays(tmp_path):
    peft_lora.main(2, tmp_path / "factors.pt")
    saved = torch.load(tmp_path / "factors.pt")
    assert peft_lora.main(1, tmp_path / "factors.pt")[-1] == []
    assert_same(torch.load(tmp_path / "factors.pt"), saved)


@pytest.mark.parametrize("done", [1, 10])
def test_resumes_with_the_same_bits(done, tmp_path):
    """Also after the step in which only half of the factors have a gain."""
    peft_lora.main(20, tmp_path / "whole.pt")
    peft_lora.main(done, tmp_path / "half.pt")
    peft_lora.main(20, tmp_path / "half.pt")
    assert_same(torch.load(tmp_path / "half.pt"), torch.load(tmp_path / "whole.pt"))


def test_resumes_under_the_trainer_with_the_same_bits(trained, tmp_path):
    saved = f"{trained.args.output_dir}/checkpoint-10"
    resumed = peft_lora.with_trainer(tmp_path, resume=saved)
    assert losses(resumed)[10:] == losses(trained)[10:]
    assert_same(parameters_of(resumed.model), parameters_of(trained.model))
    assert_same(resumed.optimizer.state_dict(), trained.optimizer.state_dict())


def test_runs_twice_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "2 steps, loss " in printed_by(peft_lora, ["--steps", "2"], monkeypatch, capsys)
    assert "nothing left to do" in printed_by(peft_lora, ["--steps", "2"], monkeypatch, capsys)


def test_goes_on_under_the_trainer_from_the_command_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = f"{trained.args.output_dir}/checkpoint-10"
    options = ["--trainer", "--steps", "11", "--resume", saved]
    assert "11 steps, loss " in printed_by(peft_lora, options, monkeypatch, capsys)
    assert not (tmp_path / "peft_lora" / "checkpoint-10").exists()  # it did not begin anew
