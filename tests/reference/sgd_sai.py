"""SGD-SaI written out, one block at a time, in float64, with every intermediate by its name."""

import math

import torch


def gain(g, rule="gsnr", eps=0.0):
    """The gain of a block from its first informative gradient, a real tensor."""
    entries = g.detach().to(torch.float64).flatten()
    n = entries.numel()
    if rule == "sqrt_numel":
        return math.sqrt(n)
    if rule != "gsnr":
        return rule
    if n == 1:
        return 1.0
    scale = entries.abs().max().item()
    entries = entries / scale
    mean = entries.sum() / n
    variance = ((entries - mean) ** 2).sum() / (n - 1)
    norm = (entries**2).sum().sqrt()
    noise = variance.sqrt() + eps / scale
    return n if norm >= n * noise else (norm / noise).item()


def informative(g):
    return g is not None and bool(torch.isfinite(g).all()) and bool((g != 0).any())


class SGDSaI:
    """One block of parameters; ``step(g)`` returns nothing and changes ``p``, ``m``, ``gain``."""

    def __init__(self, p, *, lr=1e-2, momentum=0.9, weight_decay=1e-2, eps=0.0, rule="gsnr",
                 nesterov=False, maximize=False, refresh=None, sign=False):  # fmt: skip
        self.p = p.detach().to(torch.float64).clone()
        self.m = None
        self.gain = 0.0
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.eps, self.rule, self.nesterov, self.maximize = eps, rule, nesterov, maximize
        self.refresh, self.sign, self.steps = refresh, sign, 0

    def step(self, g):
        due = self.refresh is not None and self.steps > 0 and self.steps % self.refresh == 0
        self.steps += 1
        if g is None:
            return
        if due and self.gain != 0.0 and informative(g):
            self.gain = gain(g, self.rule, self.eps)
        if self.gain == 0.0 and not torch.isfinite(g).all():
            return
        g = g.detach().to(torch.float64)
        g = -g if self.maximize else g
        if self.gain == 0.0 and informative(g):
            self.gain = gain(g, self.rule, self.eps)
            self.m = g
        elif self.gain != 0.0:
            self.m = self.momentum * self.m + (1 - self.momentum) * g
        self.p = self.p - self.lr * self.weight_decay * self.p
        if self.gain == 0.0:
            return
        direction = self.momentum * self.m + (1 - self.momentum) * g if self.nesterov else self.m
        direction = direction.sign() if self.sign else direction
        self.p = self.p - self.lr * self.gain * direction
