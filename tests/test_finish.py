"""What a model says of a whole training: asked once, after the last step, whatever stopped it."""

import dataclasses

import pytest
import torch
from tiny_training import TinyModel, go, raise_signal_at, tiny_run

from nomadam.runs import Interrupted, RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishingModel(TinyModel):
    stop: str = ""

    def finish(self, module, dataset, folder):
        if self.stop and (folder / self.stop).exists():
            (folder / self.stop).unlink()
            raise KeyboardInterrupt
        (folder / "drawn.txt").write_text(f"{dataset.description['source']} {torch.rand(1).item()}")
        return {
            "training": float(module.training),
            "gradients": float(torch.is_grad_enabled()),
            "weight": module[1].weight.double().sum().item(),
        }


def test_it_is_asked_in_evaluation_mode_without_gradients_with_the_seeds_own_draws(tmp_path):
    before = torch.get_rng_state()
    run = tiny_run(model=FinishingModel(), seed=7)
    result = go(run, tmp_path / "run")
    assert torch.equal(before, torch.get_rng_state())
    assert (result["training"], result["gradients"]) == (0, 0)
    assert result == RunFolder(tmp_path / "run").read_result()
    drawn = torch.rand(1, generator=torch.Generator().manual_seed(7)).item()
    assert (tmp_path / "run" / "drawn.txt").read_text() == f"tiny {drawn}"


@pytest.mark.parametrize("optimizer", ["sgd_sai", "schedule_free_adamw"])
def test_one_that_is_stopped_is_asked_again_and_says_the_same(tmp_path, optimizer):
    if optimizer == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    run = tiny_run(optimizer, model=FinishingModel(stop="stop"))
    whole = go(run, tmp_path / "whole")
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "stop").touch()
    with pytest.raises(Interrupted, match=f"after step {run.steps} of {run.steps}"):
        go(run, folder)
    assert RunFolder(folder).read_result() is None
    again = go(run, folder)
    assert again["weight"] == whole["weight"]
    drawn = [(each / "drawn.txt").read_text() for each in (tmp_path / "whole", folder)]
    assert drawn[0] == drawn[1]


def test_it_is_not_asked_before_the_last_step_nor_of_what_diverged(tmp_path):
    run = tiny_run(model=FinishingModel())
    with pytest.raises(Interrupted):
        go(run, tmp_path / "stopped", progress=raise_signal_at(2, "SIGINT"))
    assert not (tmp_path / "stopped" / "drawn.txt").exists()
    result = go(tiny_run("sgdm", 1e30, model=FinishingModel(), clip_norm=None), tmp_path / "run")
    assert result["status"] == "diverged" and "weight" not in result
    assert not (tmp_path / "run" / "drawn.txt").exists()
