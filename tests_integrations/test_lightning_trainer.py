"""Lightning's Trainer, which hands a closure to each step."""

import lightning_trainer
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from same_bits import assert_same, parameters_of
from torch import nn

from nomadam import SGDSaI

PACKAGES = ("lightning",)


def plain(epochs):
    """The same training by hand."""
    torch.manual_seed(0)
    model = lightning_trainer.Parabola()
    (optimizer,), (schedule,) = model.configure_optimizers()
    in_groups = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(epochs):
        for batch in lightning_trainer.batches():
            model.training_step(batch, None).backward()
            nn.utils.clip_grad_norm_(in_groups, 1.0)  # Lightning's order, for the bits
            optimizer.step()
            optimizer.zero_grad()
            schedule["scheduler"].step()
    return model, optimizer


def test_trains_as_by_hand(tmp_path):
    trainer, losses = lightning_trainer.main(2, tmp_path)
    model, reference = plain(2)
    optimizer = trainer.optimizers[0]
    assert losses == model.losses
    assert losses[-1] < losses[0] / 2
    assert optimizer.gains() == reference.gains()
    assert optimizer.gains().keys() == parameters_of(model).keys()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]
    assert_same(parameters_of(trainer.model), parameters_of(model))


def test_resumes_with_the_same_bits(tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    lightning_trainer.main(2, whole)
    lightning_trainer.main(1, half)
    assert len(lightning_trainer.main(2, half)[1]) == 10
    one, other = (torch.load(folder / "last.ckpt", weights_only=False) for folder in (half, whole))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(one[part], other[part], part)


def test_clipping_in_mixed_precision_needs_fused_none():
    """Lightning takes a fused optimizer for one that unscales the gradients itself."""
    params = list(nn.Linear(4, 2).parameters())
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.clip_gradients(SGDSaI(params), 1.0)
    with pytest.raises(RuntimeError, match="SGDSaI, does not allow for gradient clipping"):
        precision.clip_gradients(SGDSaI(params, fused=True), 1.0)
