"""Several processes that train together end as one process does, whoever began and whoever goes on.

Three of them share 8 rows here, so that none divides what they have to do.
"""

import dataclasses
import datetime
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import in_processes
from tiny_training import (
    TinyData,
    TinyModel,
    assert_same_training,
    go,
    raise_signal_at,
    tiny_run,
    weights,
    without_timings,
)
from torch import nn

from nomadam.cli import main
from nomadam.experiments import processes
from nomadam.experiments.joint_batch_norm import join_batch_norms
from nomadam.runs import Interrupted, RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide(TinyModel):
    """In float64, so that nothing but the order of sums sets two trainings apart."""

    dropout: float = 0.0
    batch_norm: bool = False

    def build(self, *, vocab_size):
        module = super().build(vocab_size=vocab_size).double()
        if self.batch_norm:
            module[2] = nn.Sequential(Turned(), nn.BatchNorm1d(self.width), Turned()).double()
        return module

    def loss(self, module, batch):
        logits = module(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def wide_run(**changes):
    changes = {"model": Wide(), "batch_size": 8, "accumulation": 2} | changes
    return tiny_run(**changes, data=TinyData(context=3))


def norms_run():
    return wide_run(model=Wide(batch_norm=True), accumulation=1)


def noisy_run():
    """With dropout, which each process draws for itself."""
    return wide_run(model=Wide(dropout=0.3))


def as_launched(rank, size):
    launched = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in launched.items()})


def train_together(folder):
    as_launched(torch.distributed.get_rank(), torch.distributed.get_world_size())
    seen = []
    go(wide_run(), folder / "three", progress=seen.append)
    assert len(seen) == (12 if processes.is_first() else 0)
    go(wide_run(), folder / "one_then_three")
    go(norms_run(), folder / "norms")
    go(noisy_run(), folder / "noisy")
    # A signal to any of them stops all at the same step.
    stop = Stopper(last=processes.index() == processes.count() - 1)
    with pytest.raises(Interrupted, match="goes on after step 5 of 12"):
        go(stop.run, folder / "noisy_parts")
    with pytest.raises(Interrupted, match="goes on after step 5 of 12"):
        go(wide_run(), folder / "three_then_one", progress=raise_signal_at(5, "SIGTERM"))
    go(noisy_run(), folder / "noisy_parts")
    check_sums()


class Stopper:
    """Interrupts one process while it computes the loss of step 5."""

    calls = 0

    def __init__(self, *, last):
        self.run = noisy_run()
        if not last:
            return
        loss = Wide.loss

        def interrupting(model, module, batch):
            Stopper.calls += module.training
            if Stopper.calls == 9:  # two a step
                Wide.loss = loss
                signal.raise_signal(signal.SIGINT)
            return loss(model, module, batch)

        Wide.loss = interrupting


def check_sums():
    """A gradient that some or all processes do not have; tensors of several dtypes and sizes."""
    first, count = processes.is_first(), processes.count()
    sizes = [(3,), (2, 2), (5,), (4,)]
    dtypes = [torch.float32, torch.float64, torch.float64, torch.float32]
    tensors = [
        nn.Parameter(torch.zeros(size, dtype=dtype))
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]
    tensors[0].grad = torch.full((3,), float(processes.index()))
    if first:
        tensors[1].grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).T
    tensors[2].grad = torch.ones(5, dtype=torch.float64)
    processes.BUCKET_BYTES = 16
    processes.sum_gradients(tensors)
    assert tensors[0].grad.tolist() == [sum(range(count))] * 3
    assert tensors[1].grad.tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert tensors[2].grad.tolist() == [count] * 5
    assert tensors[3].grad is None
    assert processes.gathered([processes.index()]) == list(range(count))
    seeds = processes.gathered([processes.own_seed(3, step) for step in (0, 7)])
    assert seeds[:2] == [3, 3] and len(set(seeds[2:])) == 2 * (count - 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    go(wide_run(), folder / "one")
    with pytest.raises(Interrupted):
        go(wide_run(), folder / "one_then_three", progress=raise_signal_at(6, "SIGINT"))
    go(norms_run(), folder / "norms_one")
    in_processes(3, train_together, folder)
    go(wide_run(), folder / "three_then_one")
    return folder


def assert_equal_to_rounding(one: Path, other: Path, *, noise=()):
    for left, right in zip(without_timings(one), without_timings(other), strict=True):
        # The one number that is added in float32.
        assert left.pop("train_loss") == pytest.approx(right.pop("train_loss"), rel=1e-6)
        assert left == pytest.approx(right, rel=1e-12)
    left, right = weights(one, 12), weights(other, 12)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-12)
    gains = [RunFolder(folder).read_json("gains.json")["blocks"] for folder in (one, other)]
    for name in gains[0].keys() - set(noise):
        assert gains[0][name]["gain"] == pytest.approx(gains[1][name]["gain"], rel=1e-9), name


@pytest.mark.parametrize("name", ["three", "one_then_three", "three_then_one"])
def test_three_processes_end_as_one_does(trained, name):
    assert_equal_to_rounding(trained / "one", trained / name)


def test_batch_norms_have_the_statistics_of_all_rows(trained):
    # The gradient of a bias before a batch norm is nothing but rounding.
    assert_equal_to_rounding(trained / "norms_one", trained / "norms", noise=["1.bias"])
    names = weights(trained / "norms", 12)
    assert {"2.1.running_mean", "2.1.running_var", "2.1.num_batches_tracked"} <= set(names)


def test_stopped_by_a_signal_to_one_they_go_on_bit_for_bit(trained):
    assert_same_training(trained / "noisy", trained / "noisy_parts", 12)
    state = RunFolder(trained / "noisy" / "checkpoints" / "step_00000012").read_json("state.json")
    torch_states = {generators["torch"] for generators in state["random"]}
    assert len(torch_states) == 3, "each process draws for itself"


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"batch_size": 2}, "cpu", "batch_size = 2: must be at least 3, the processes"),
        ({}, "mps", "device = 'mps': must be"),
    ],
)
def test_what_several_processes_can_not_do(tmp_path, monkeypatch, changes, device, message):
    monkeypatch.setenv("WORLD_SIZE", "3")
    from nomadam.experiments.training import train

    with pytest.raises(ValueError, match=message):
        train(tiny_run(**changes), tmp_path / "run", device=device)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 2)])
def test_a_joint_batch_norm_is_a_batch_norm(monkeypatch, momentum, shape):
    """Where there is nobody else to sum with."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    plain, joint = (kind(3, momentum=momentum, dtype=torch.float64) for _ in range(2))
    join_batch_norms(joint)
    for step in range(3):
        rows = torch.randn(shape, dtype=torch.float64) * 3 + step
        outputs = []
        for norm in (plain, joint):
            own = rows.clone().requires_grad_()
            output = norm(own)
            output.square().mul(
                torch.arange(3.0).view(1, 3, *[1] * (len(shape) - 2))
            ).sum().backward()
            outputs.append([output, own.grad, norm.weight.grad, norm.bias.grad])
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(plain.state_dict(), joint.state_dict())
    torch.testing.assert_close(plain.eval()(rows), joint.eval()(rows))
    with pytest.raises(ValueError, match="several values"):
        joint.train()(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("world", "rank", "words"),
    [
        ("two", "0", "WORLD_SIZE = 'two': must be a whole number from 1"),
        ("0", "0", "WORLD_SIZE = '0'"),
        ("2", "", "RANK = '': must be a whole number from 0 to 1"),
        ("2", "5", "RANK = '5': must be a whole number from 0 to 1"),
        ("2", "-1", "RANK = '-1'"),
    ],
)
def test_numbers_that_no_launcher_sets_are_refused(world, rank, words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", rank)
    assert main(["run", "tiny_training.tiny_run"]) == 2
    assert words in capsys.readouterr().err


def test_an_empty_number_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert (processes.count(), processes.index()) == (1, 0)


def test_one_that_waits_alone_says_so(monkeypatch):
    monkeypatch.setattr(processes, "TO_MEET", datetime.timedelta(seconds=1))
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(RuntimeError, match="process 0 waited 0:00:01 for all 2 processes"):
        processes.meeting_place("alone")
