"""A net with all that gradient release has to cope with, and steps of it with and without."""

import torch
from torch import nn

from nomadam import SGDSaI

VOCABULARY, WIDTH = 96, 64


class Net(nn.Module):
    """Tied embeddings, a frozen scale, a gate that starts at zero, and experts of which one works.

    Of its blocks the embedding and the matrices are large enough for an 8-bit momentum.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.full((), 1.5), requires_grad=False)

    def forward(self, tokens, expert=0):
        x = self.norm(self.embedding(tokens)) * self.scale
        x = x + self.experts[expert](x).tanh() * (1 + self.gate)
        return x @ self.embedding.weight.T


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def loss_of(model, number, expert=0):
    tokens = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(number))
    logits = model(tokens[:, :-1], expert).flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())


def names(model):
    return [name for name, _ in model.named_parameters()]


def groups(model):
    """The same as one group, and as two with rates and decays of their own."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    others = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
    return [{"params": matrices, "lr": 3e-3}, {"params": others, "weight_decay": 0.0}]


def assert_same(one, other):
    """Two values of any make are equal, tensors bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def assert_same_training(one, other):
    """Weights and the whole state of two pairs of model and optimizer are equal."""
    assert_same(dict(one[0].state_dict()), dict(other[0].state_dict()))
    assert_same(one[1].state_dict(), other[1].state_dict())
    assert one[1].gains() == other[1].gains()


def gradients(model):
    return {name for name, p in model.named_parameters() if p.grad is not None}


def ordinary(model, optimizer, *losses):
    for loss in losses:
        loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def released(release, model, *losses):
    with release.accumulate():
        for loss in losses[:-1]:
            loss(model).backward()
    losses[-1](model).backward()


def pair(dtype=torch.float32, make=SGDSaI, **options):
    """Model and optimizer, twice the same."""
    return [(m, make(m.named_parameters(), **options)) for m in (net(dtype), net(dtype))]
