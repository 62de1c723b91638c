"""SGDSaI by class path and `key=value` strings, as kohya's trainers and others take optimizers.

Run it as `python examples/kohya_arguments.py --optimizer_type nomadam.SGDSaI --learning_rate 1e-2
--optimizer_args momentum=0.9 weight_decay=0.01 "momentum_dtype='int8'"`. These are the arguments
that sd-scripts takes. A value is a Python literal, so that a string needs quotes of its own.
"""

import argparse
import ast
import importlib

import torch
from torch import nn


def optimizer_of(params, optimizer_type, learning_rate, optimizer_args=()):
    """The optimizer that a class path and its arguments name."""
    module, _, name = optimizer_type.rpartition(".")
    if not module:
        raise ValueError(f"--optimizer_type {name}: a class path is needed, as nomadam.SGDSaI")
    options = dict(map(option_of, optimizer_args))
    return getattr(importlib.import_module(module), name)(params, lr=learning_rate, **options)


def option_of(argument):
    """Name and value of `name=value`."""
    name, equals, value = argument.partition("=")
    if not equals:
        raise ValueError(f"--optimizer_args {argument}: name=value is needed, as momentum=0.9")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        message = f"--optimizer_args {argument}: a string needs quotes of its own, {name}=\"'...'\""
        raise ValueError(message) from error


def batch_of(step):
    """64 points of a parabola; a function of the step."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step))
    return x, x.square().sum(dim=1, keepdim=True)


def train(model, optimizer, steps):
    """Takes these steps; returns the loss of each."""
    losses = []
    for step in steps:
        x, y = batch_of(step)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(optimizer_type="nomadam.SGDSaI", learning_rate=1e-2, optimizer_args=(), steps=20):
    """Trains; returns model, optimizer and the loss of each step."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
    model = nn.Sequential(*layers)
    # One group, with a rate of its own, as these trainers make one for each network.
    groups = [{"params": list(model.parameters()), "lr": learning_rate}]
    optimizer = optimizer_of(groups, optimizer_type, learning_rate, optimizer_args)
    return model, optimizer, train(model, optimizer, range(steps))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer_type", default="nomadam.SGDSaI")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--optimizer_args", nargs="*", default=[])
    losses = main(**vars(parser.parse_args()))[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}")
