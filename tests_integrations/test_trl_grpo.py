"""trl's GRPOTrainer, whose gradient is zero where all rewards are the same."""

import pytest
import trl_grpo
from as_script import printed_by
from same_bits import assert_same, parameters_of

PACKAGES = ("trl", "transformers", "accelerate")


def rewards(trainer):
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trl_grpo.main(tmp_path_factory.mktemp("trl_grpo"))


def test_trains(trained):
    assert rewards(trained)[0] < 0.1 < 0.5 < rewards(trained)[-1]
    gains = trained.optimizer.optimizer.gains()
    assert gains.keys() == parameters_of(trained.model).keys()


def test_gains_wait_until_rewards_differ(tmp_path):
    calls = []

    def late(completions, **_):
        calls.append(None)
        return trl_grpo.share_of_true(completions) if len(calls) > 2 else [0.5] * len(completions)

    waiting = trl_grpo.main(tmp_path / "waiting", steps=2, reward=late)
    assert waiting.optimizer.optimizer.gains() == {}
    untrained = trl_grpo.model_of(trl_grpo.tokenizer_of())
    assert_same(parameters_of(waiting.model), parameters_of(untrained))
    calls.clear()
    begun = trl_grpo.main(tmp_path / "begun", steps=4, reward=late)
    assert begun.optimizer.optimizer.gains().keys() == parameters_of(begun.model).keys()


def test_resumes_with_the_same_bits(trained, tmp_path):
    """In the first pass over the prompts: trl shuffles a later one as the first, with AdamW too."""
    resumed = trl_grpo.main(tmp_path, resume=f"{trained.args.output_dir}/checkpoint-10")
    assert rewards(resumed)[10:] == rewards(trained)[10:]
    assert_same(parameters_of(resumed.model), parameters_of(trained.model))
    assert_same(resumed.optimizer.state_dict(), trained.optimizer.state_dict())


def test_goes_on_from_the_command_line(trained, tmp_path, monkeypatch, capsys):
    saved = f"{trained.args.output_dir}/checkpoint-10"
    options = ["--folder", str(tmp_path), "--steps", "11", "--resume", saved]
    assert "11 steps, reward " in printed_by(trl_grpo, options, monkeypatch, capsys)
    assert not (tmp_path / "checkpoint-10").exists()  # it did not begin anew
