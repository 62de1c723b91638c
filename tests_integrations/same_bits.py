"""Compares states of any nesting to the bit."""

import torch


def assert_same(found, expected, where="state"):
    """The same keys, lengths, dtypes and bits; tensors may not be NaN."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda m: f"{where}: {m}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert found == expected, f"{where}: {found} is not {expected}"


def parameters_of(model):
    """Copies of the trainable parameters by name, to compare with later ones."""
    named = model.named_parameters()
    return {name: param.detach().clone() for name, param in named if param.requires_grad}
