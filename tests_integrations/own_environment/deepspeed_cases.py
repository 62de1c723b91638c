"""What holds under DeepSpeed, each case in several processes over gloo."""

import os
import tempfile
from pathlib import Path

import deepspeed
import deepspeed_zero
import pytest
import torch
import torch.distributed as dist
from deepspeed_zero import batch_of, loss_of
from same_bits import assert_same, parameters_of
from torch import nn

from nomadam import SGDSaI

STEPS = 20


def folder_of_all():
    """One new folder for all processes."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # DeepSpeed's launcher and torchrun set it
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def alone():
    """The training of one process on the whole batches, without DeepSpeed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))
    optimizer = SGDSaI(model.named_parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for step in range(STEPS):
        loss_of(model, batch_of(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, optimizer


def trains(stage):
    engine, losses = deepspeed_zero.main(stage, STEPS, folder_of_all())
    assert losses[-1] < losses[0] / 2
    model, optimizer = alone()
    if stage == 0:
        assert engine.optimizer.gains() == pytest.approx(optimizer.gains(), rel=1e-5)
    else:  # the vectors were stepped by a number
        groups = engine.optimizer.optimizer.param_groups
        assert [len(group["params"]) for group in groups] == [1] * len(optimizer.gains())
    expected = parameters_of(model)
    for name, found in parameters_of(engine.module).items():
        torch.testing.assert_close(found, expected[name], rtol=2e-5, atol=2e-6)


def resumes(stage):
    whole, half = folder_of_all(), folder_of_all()
    expected = parameters_of(deepspeed_zero.main(stage, STEPS, whole)[0].module)
    deepspeed_zero.main(stage, STEPS // 2, half)
    engine, losses = deepspeed_zero.main(stage, STEPS, half)
    assert len(losses) == STEPS // 2
    assert_same(parameters_of(engine.module), expected)


def refuses(stage):
    """Blocks that are given to ZeRO as they are."""
    folder_of_all()
    model = nn.Linear(8, 4)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=SGDSaI(model.named_parameters()),
        config={**deepspeed_zero.CONFIG, "zero_optimization": {"stage": stage}},
    )
    before = parameters_of(model)
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    with pytest.raises(ValueError, match="flattened.*measure_gains.*gain=1.0"):
        engine.step()
    assert_same(parameters_of(model), before)


def trains_without_zero():
    trains(0)


def trains_with_zero_1():
    trains(1)


def trains_with_zero_2():
    trains(2)


def resumes_without_zero():
    resumes(0)


def resumes_with_zero_1():
    resumes(1)


def resumes_with_zero_2():
    resumes(2)


def refuses_the_vectors_of_zero_1():
    refuses(1)


def refuses_the_vectors_of_zero_2():
    refuses(2)


TRAINS = (trains_without_zero,)
RESUMES = (resumes_without_zero, resumes_with_zero_1, resumes_with_zero_2)
SHARDED = (
    trains_with_zero_1,
    trains_with_zero_2,
    refuses_the_vectors_of_zero_1,
    refuses_the_vectors_of_zero_2,
)


def cases(size):
    return TRAINS + RESUMES + SHARDED
