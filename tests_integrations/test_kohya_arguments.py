"""SGDSaI named by a class path, its options by `key=value` strings."""

import subprocess
import sys

import kohya_arguments
import pytest
import torch

import nomadam

PACKAGES = ()


def test_trains_from_the_command_line():
    command = [sys.executable, kohya_arguments.__file__, "--optimizer_type", "nomadam.SGDSaI"]
    command += ["--learning_rate", "5e-3", "--optimizer_args", "momentum=0.8", "weight_decay=0.02"]
    printed = subprocess.run(
        [*command, "momentum_dtype='int8'"], check=True, capture_output=True, text=True
    ).stdout
    given = ["momentum=0.8", "weight_decay=0.02", "momentum_dtype='int8'"]
    model, optimizer, losses = kohya_arguments.main("nomadam.SGDSaI", 5e-3, given)
    assert printed == f"20 steps, loss {losses[-1]:.4f}\n"
    assert losses[-1] < losses[0] / 2
    assert isinstance(optimizer, nomadam.SGDSaI)
    assert optimizer.gains().keys() == set(range(len(list(model.parameters()))))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (5e-3, 0.8, 0.02)
    assert optimizer.state[model[2].weight]["momentum_buffer"].dtype == torch.int8


def test_resumes_with_the_same_bits():
    """Such trainers keep the optimizer's state dict."""
    gained = ["momentum_dtype='int8'"]
    whole, _, losses = kohya_arguments.main(optimizer_args=gained)
    model, optimizer, _ = kohya_arguments.main(optimizer_args=gained, steps=10)
    again = kohya_arguments.optimizer_of(model.parameters(), "nomadam.SGDSaI", 1e-2, gained)
    again.load_state_dict(optimizer.state_dict())
    found = kohya_arguments.train(model, again, range(10, 20))
    assert found == losses[10:]
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_misspelt_argument_is_refused():
    with pytest.raises(TypeError, match="momentun"):
        kohya_arguments.main(optimizer_args=["momentun=0.9"])


@pytest.mark.parametrize("argument", ["momentum_dtype=int8", "momentum", "lr=1 e"])
def test_a_value_that_is_no_literal_is_named(argument):
    with pytest.raises(ValueError, match=f"--optimizer_args {argument}: .* (needed|needs)"):
        kohya_arguments.main(optimizer_args=[argument])


def test_a_name_without_its_module_is_refused():
    with pytest.raises(ValueError, match="--optimizer_type SGDSaI: .* nomadam.SGDSaI"):
        kohya_arguments.main("SGDSaI")
