"""Trainings of milliseconds a step with their own model and data, and ways to compare them."""

import dataclasses
import hashlib
import signal
import warnings
from types import SimpleNamespace

import torch
from torch import nn

from nomadam.experiments.configuration import OptimizerChoice, Run
from nomadam.experiments.schedule import Schedule
from nomadam.optimizers.baselines import BASELINES
from nomadam.runs import TIMINGS, RunFolder

VOCABULARY = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyModel:
    width: int = 8
    dropout: float = 0.1

    def build(self, *, vocab_size: int) -> nn.Module:
        return nn.Sequential(
            nn.Embedding(vocab_size, self.width),
            nn.Linear(self.width, self.width),
            nn.LayerNorm(self.width),
            nn.Dropout(self.dropout),
            nn.Linear(self.width, vocab_size, bias=False),
        )

    def loss(self, module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = module(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyData:
    """Row r of step s counts up from a random token by a random stride."""

    context: int = 6
    text: str = "counting"

    @property
    def tokens_per_row(self) -> int:
        return self.context

    def load(self, cache_folder=None) -> SimpleNamespace:
        sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        return SimpleNamespace(description={"source": "tiny", "sha256": sha256})

    def shape(self, dataset) -> dict[str, int]:
        return {"vocab_size": VOCABULARY}

    def train_batch(self, dataset, *, seed, step, micro, batch_size) -> torch.Tensor:
        # Rows are counted over the micro-batches: 2 x 4 rows are the same as 1 x 8.
        rows = range(micro * batch_size, (micro + 1) * batch_size)
        return torch.stack([self._row(1000 * (seed + 1) * step + row) for row in rows])

    def validation_batches(self, dataset, *, batch_size, max_batches):
        for index in range(min(3, max_batches or 3)):
            rows = batch_size if index < 2 else 1
            yield torch.stack([self._row(-1 - 100 * index - row) for row in range(rows)])

    def _row(self, number: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(number % 2**32)
        start, stride = torch.randint(1, 5, (2,), generator=draw)
        return (start + stride * torch.arange(self.context + 1)) % VOCABULARY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragile(TinyModel):
    """Its loss is not finite once a weight is larger than the limit, after too high a rate."""

    limit: float = 8.0

    def loss(self, module, batch):
        large = max(parameter.abs().max() for parameter in module.parameters()) > self.limit
        return super().loss(module, batch) * (float("nan") if large else 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gone(TinyData):
    """Data that are not there."""

    def load(self, cache_folder=None):
        raise ValueError("data source '/nowhere': no such folder")


def tiny_run(optimizer: str = "sgd_sai", lr: float = 3e-2, **changes) -> Run:
    # Some have to be told which layer is the output of a model that does not say so itself.
    row = BASELINES.get(optimizer)
    arguments = {"head": "4.weight"} if row is not None and "head" in row.arguments() else {}
    fields = {
        "name": "tiny_training.tiny_run",
        "model": TinyModel(),
        "data": TinyData(),
        "optimizer": OptimizerChoice(name=optimizer, lr=lr, arguments=arguments),
        "schedule": Schedule(warmup_fraction=0.2),
        "steps": 12,
        "batch_size": 4,
        "evaluate_every": 4,
        "checkpoint_every": 4,
    }
    return Run(**{**fields, **changes})


def to_be_killed() -> Run:
    """Steps and checkpoints of some milliseconds each, so that a kill can meet either."""
    return tiny_run(
        "adamw",
        1e-3,
        name="tiny_training.to_be_killed",
        model=TinyModel(width=192),
        data=TinyData(context=32),
        steps=60,
        batch_size=16,
        evaluate_every=10,
        checkpoint_every=5,
    )


def go(run, folder, **options):
    """Train on the CPU; a warning is an error."""
    # Imported here: what only wants a Run need not wait for it.
    from nomadam.experiments.training import train

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return train(run, folder, device="cpu", **options)


def without_timings(folder):
    return [
        {key: value for key, value in record.items() if key not in TIMINGS}
        for record in RunFolder(folder).metrics()
    ]


def weights(folder, step):
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def assert_same_training(one, other, step):
    assert without_timings(one) == without_timings(other)
    left, right = weights(one, step), weights(other, step)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def raise_signal_at(step, number):
    def progress(record):
        if record["step"] == step:
            signal.raise_signal(getattr(signal, number))

    return progress
