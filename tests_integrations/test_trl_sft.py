"""trl's SFTTrainer."""

import pytest
import trl_sft
from as_script import printed_by
from same_bits import assert_same, parameters_of

PACKAGES = ("trl", "transformers", "accelerate")


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trl_sft.main(tmp_path_factory.mktemp("trl_sft"))


def test_trains(trained):
    found = losses(trained)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    optimizer = trained.optimizer.optimizer
    assert list(optimizer.gains()) == list(range(len(parameters_of(trained.model))))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [2e-2, 0.0]


def test_resumes_with_the_same_bits(trained, tmp_path):
    resumed = trl_sft.main(tmp_path, resume=f"{trained.args.output_dir}/checkpoint-10")
    assert losses(resumed)[10:] == losses(trained)[10:]
    assert_same(parameters_of(resumed.model), parameters_of(trained.model))
    assert_same(resumed.optimizer.state_dict(), trained.optimizer.state_dict())


def test_goes_on_from_the_command_line(trained, tmp_path, monkeypatch, capsys):
    saved = f"{trained.args.output_dir}/checkpoint-10"
    options = ["--folder", str(tmp_path), "--steps", "11", "--resume", saved]
    assert "11 steps, loss " in printed_by(trl_sft, options, monkeypatch, capsys)
    assert not (tmp_path / "checkpoint-10").exists()  # it did not begin anew
