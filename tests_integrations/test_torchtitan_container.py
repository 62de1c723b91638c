"""torchtitan's container of optimizers, its schedule and checkpoints, on its smallest Llama."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torchtitan_container
from same_bits import assert_same, parameters_of
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Optimizer
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

import nomadam

PACKAGES = ("torchtitan",)


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_trains(tmp_path, implementation):
    model, container, losses = torchtitan_container.main(20, tmp_path / "c", implementation)
    assert losses[-1] < losses[0] * 0.7
    (optimizer,) = container
    assert optimizer.gains().keys() == parameters_of(model).keys()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]
    group = optimizer.param_groups[0]
    found = group["fused"], group["foreach"]
    assert found == (implementation == "fused", implementation == "foreach")
    assert "layers.0.attention.wq.weight" in group["param_names"]


def test_trains_as_by_hand(tmp_path):
    start, _, _ = torchtitan_container.main(0, tmp_path / "start")
    model, (optimizer,), losses = torchtitan_container.main(10, tmp_path / "c")
    reference = nomadam.SGDSaI(nomadam.decay_groups(start, 1e-2), lr=1e-2, foreach=True)
    for step in range(10):
        reference.param_groups[0]["lr"] = reference.param_groups[1]["lr"] = 1e-2 * rate(step)
        tokens, labels = torchtitan_container.batch_of(step)
        loss = nn.functional.cross_entropy(start(tokens).flatten(0, 1), labels.flatten())
        assert loss.item() == losses[step]
        loss.backward()
        nn.utils.clip_grad_norm_(start.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    assert optimizer.gains() == reference.gains()
    assert_same(parameters_of(model), parameters_of(start))


def rate(step):
    """5 steps of warm-up, and then a straight line to 0 at step 100."""
    return (step + 1) / 5 if step < 5 else 1 - (step - 5) / 95


def test_resumes_with_the_same_bits(tmp_path):
    whole = torchtitan_container.main(20, tmp_path / "whole")
    torchtitan_container.main(10, tmp_path / "half")
    half = torchtitan_container.main(20, tmp_path / "half")
    assert half[2] == whole[2][10:]
    assert_same(parameters_of(half[0]), parameters_of(whole[0]))
    assert_same(half[1].state_dict(), whole[1].state_dict())


def test_sharded_by_fsdp2_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [torchtitan_container.__file__, "--folder", str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True)
    found, (optimizer,), losses = torchtitan_container.main(20, tmp_path / "two")
    assert not losses  # read in one process what two have saved
    expected, (reference,), _ = torchtitan_container.main(20, tmp_path / "one")
    assert optimizer.gains() == pytest.approx(reference.gains(), rel=1e-4)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_state_that_is_read_before_the_first_step_changes_nothing(tmp_path):
    """It is made by a step of zero gradients at a rate of zero."""
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 32, "max_seq_len": 16}
    model = Transformer(TransformerModelArgs(**sizes))
    container = torchtitan_container.build_sgd_sai([model], Optimizer(lr=1e-2))
    before = parameters_of(model)
    container.state_dict()
    assert_same(parameters_of(model), before)
    assert container.optimizers[0].gains() == {}
    tokens, labels = torchtitan_container.batch_of(0)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
    container.step()
    assert container.optimizers[0].gains().keys() == before.keys()


def test_the_container_of_torchtitan_takes_the_class_too():
    model = nn.Linear(4, 2)
    options = {"lr": 1e-2, "weight_decay": 0.1, "fused": False, "foreach": True}
    container = OptimizersContainer([model], nomadam.SGDSaI, options)
    model(torch.eye(4)).square().mean().backward()
    container.step()
    assert len(container.optimizers[0].gains()) == 2


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    assert len(torchtitan_container.main(2, tmp_path)[-1]) == 2


def test_what_it_would_leave_out_is_refused():
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="early_step_in_backward=True"):
        torchtitan_container.build_sgd_sai([model], Optimizer(early_step_in_backward=True))
    manager = SimpleNamespace(enabled=True)
    with pytest.raises(ValueError, match="fault_tolerance"):
        torchtitan_container.build_sgd_sai([model], Optimizer(), None, manager)
    manager.enabled = False  # torchtitan hands one over in any case
    torchtitan_container.build_sgd_sai([model], Optimizer(), None, manager)


def test_the_options_of_the_caller_stay():
    options = {"lr": 1e-2, "weight_decay": 0.1}
    torchtitan_container.SGDSaIContainer([nn.Linear(4, 2)], options)
    assert options == {"lr": 1e-2, "weight_decay": 0.1}
