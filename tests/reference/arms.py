"""The arms beside the baselines, one tensor in float64, as their papers state them."""

import torch


def scale(theta, grads, *, lr, weight_decay, over, momentum=None):
    """SCALE for a matrix whose columns lie along a dimension; with momentum it is the last one."""
    buffer = torch.zeros_like(theta)
    for grad in grads:
        direction = grad
        if momentum is not None:
            buffer = momentum * buffer + (1 - momentum) * grad
            direction = buffer
        rms = (direction**2).mean(over, keepdim=True).sqrt()
        unit = torch.where(rms > 0, direction / rms, 0.0)
        theta = theta - lr * weight_decay * theta
        theta = theta - lr * unit
        yield theta


def apollo_mini(theta, grads, *, lr, weight_decay, line_at, beta1=0.9, beta2=0.999, eps=1e-8,
                scale=128.0):  # fmt: skip
    """APOLLO-Mini for a matrix with no more rows than columns; `line_at(t)` is P at step t."""
    m = v = torch.zeros(theta.shape[1], dtype=theta.dtype)
    length = None
    for t, grad in enumerate(grads, 1):
        projected = (line_at(t)[:, None] * grad).sum(0)
        m = beta1 * m + (1 - beta1) * projected
        v = beta2 * v + (1 - beta2) * projected**2
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        step = grad * update.norm() / projected.norm()
        if length is not None and step.norm() > 1.01 * length:
            step = step * 1.01 * length / step.norm()
        length = step.norm()
        theta = theta - lr * weight_decay * theta
        theta = theta - lr * scale**0.5 * step
        yield theta


def nearly_orthogonal(matrix, steps=5):
    """Newton-Schulz by the singular values, each of which goes through the same polynomial."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def scion(theta, grads, *, lr, weight_decay, norm, radius, momentum=0.9):
    """Scion; `theta` of a hidden matrix is [outputs, inputs]."""
    buffer = torch.zeros_like(theta)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        if norm == "spectral":
            outputs, inputs = theta.shape
            step = (outputs / inputs) ** 0.5 * nearly_orthogonal(buffer)
        elif norm == "sign":
            step = buffer.sign() / theta.shape[1]
        else:
            step = buffer / (buffer**2).mean().sqrt()
        theta = theta - lr * weight_decay * theta
        theta = theta - lr * radius * step
        yield theta


def sgd_sai_rows(theta, grads, *, lr, weight_decay, row_dim=None, momentum=0.9, beta2=0.99):
    """SGD-SaI that follows training, for one block; `row_dim` runs along a row, None for a block.

    Gradients before the first one that is not all zero only decay.
    """
    m = v = gain = first = None
    t = 0
    for grad in grads:
        theta = theta - lr * weight_decay * theta
        if t or grad.abs().max() > 0:
            t += 1
            square = (grad**2).mean() if row_dim is None else (grad**2).mean(row_dim, keepdim=True)
            if t == 1:
                gain, first = grad.norm() / grad.std(), (grad**2).mean().sqrt()
                m, v = grad, torch.zeros_like(square)
            else:
                m = momentum * m + (1 - momentum) * grad
            v = beta2 * v + (1 - beta2) * square
            r = (v / (1 - beta2**t)).sqrt()
            f = first / r if row_dim is None else (r**2).sum() / r.sum() / r
            f = torch.where(r > 0, f.sqrt(), 0.0)
            theta = theta - lr * gain * f * m
        yield theta
