"""Batch normalisation over the rows of all processes, as one process would have it.

torch's own (``SyncBatchNorm``) has no form for the CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def join_batch_norms(module: nn.Module) -> None:
    """Have the batch norms of a module normalise by the rows of all processes while they train.

    Their parameters, buffers and names stay, and evaluation is as before, each process by itself.

    Args:
        module: changed in place; processes have met, and all of them call it at the same times.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> join_batch_norms(net)
        >>> type(net[1]).__name__, net[1].num_features
        ('JointBatchNorm', 2)
    """
    for each in module.modules():
        if type(each) in KINDS:
            each.__class__ = JointBatchNorm


class JointBatchNorm(_BatchNorm):
    """A batch norm of any number of dimensions whose mean and variance are those of all rows."""

    def forward(self, input: Tensor) -> Tensor:
        """The normalised rows of this process, in the input's dtype; computed in float32 or wider.

        Args:
            input: `[rows, channels, ...]`; the number of rows may differ between processes.

        Raises:
            ValueError: for one value a channel in all processes together.
        """
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        here = wide.new_full((1,), input.numel() / self.num_features)
        sums = _Sum.apply(torch.cat([wide.sum(dims), here]))
        number, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        if number <= 1:
            raise ValueError(f"expected several values a channel, got one: {tuple(input.shape)}")
        deviations = wide - mean.view(shape)
        variance = _Sum.apply(deviations.square().sum(dims)) / number
        self._follow(mean.detach(), variance.detach() * number / (number - 1))
        output = deviations * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            output = output * self.weight.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics on by this batch."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        part = self.momentum
        if part is None:  # the mean of all batches so far
            part = 1.0 / self.num_batches_tracked.item()
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(now.to(running.dtype), part)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any is right: it was another class's before."""


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; so is the gradient, of the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
