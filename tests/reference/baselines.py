"""The baselines' recurrences for one tensor in float64, as their papers state them."""

import math

import torch


def sgdm(theta, grads, *, lr, weight_decay, momentum=0.9, decoupled=False):
    buffer = None
    for grad in grads:
        if not decoupled:
            grad = grad + weight_decay * theta
        buffer = grad if buffer is None else momentum * buffer + (1 - momentum) * grad
        if decoupled:
            theta = theta - lr * weight_decay * theta
        theta = theta - lr * buffer
        yield theta


def adam(theta, grads, *, lr, weight_decay, beta1=0.9, beta2=0.999, eps=1e-8, decoupled=False):
    m = v = torch.zeros_like(theta)
    for t, grad in enumerate(grads, 1):
        if not decoupled:
            grad = grad + weight_decay * theta
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        if decoupled:
            theta = theta - lr * weight_decay * theta
        theta = theta - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        yield theta


def lion(theta, grads, *, lr, weight_decay, beta1=0.9, beta2=0.99):
    m = torch.zeros_like(theta)
    for grad in grads:
        update = (beta1 * m + (1 - beta1) * grad).sign()
        theta = theta - lr * (update + weight_decay * theta)
        m = beta2 * m + (1 - beta2) * grad
        yield theta


def adafactor(theta, grads, *, lr, weight_decay, eps1=1e-30, eps2=1e-3):
    rows = columns = 0.0
    for t, grad in enumerate(grads, 1):
        beta2 = 1 - t**-0.8
        square = grad**2 + eps1
        rows = beta2 * rows + (1 - beta2) * square.sum(1, keepdim=True)
        columns = beta2 * columns + (1 - beta2) * square.sum(0, keepdim=True)
        update = grad / (rows @ columns / rows.sum()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        alpha = max(eps2, float(theta.square().mean().sqrt())) * min(lr, 1 / math.sqrt(t))
        theta = theta - lr * weight_decay * theta - alpha * update
        yield theta


def prodigy(theta, grad_at, *, steps, weight_decay, beta1=0.9, beta2=0.999, eps=1e-8, d=1e-6):
    start, root = theta, math.sqrt(beta2)
    m = v = s = torch.zeros_like(theta)
    r = 0.0
    for _ in range(steps):
        grad = grad_at(theta)
        m = beta1 * m + (1 - beta1) * d * grad
        v = beta2 * v + (1 - beta2) * d**2 * grad**2
        r = root * r + (1 - root) * d**2 * float((grad * (start - theta)).sum())
        s = root * s + (1 - root) * d**2 * grad
        bound = r / float(s.abs().sum())
        theta = theta - d * weight_decay * theta - d * m / (v.sqrt() + d * eps)
        d = max(d, bound)
        yield theta, d


def schedule_free_adamw(theta, grads_at, *, lrs, weight_decay, beta1=0.9, beta2=0.999, eps=1e-8):
    x = z = theta
    v, weights = torch.zeros_like(theta), 0.0
    for t, (grad_at, lr) in enumerate(zip(grads_at, lrs, strict=True), 1):
        y = (1 - beta1) * z + beta1 * x
        grad = grad_at(y)
        v = beta2 * v + (1 - beta2) * grad**2
        step = grad / ((v / (1 - beta2**t)).sqrt() + eps) + weight_decay * y
        z = z - lr * step
        weights += lr**2
        share = lr**2 / weights
        x = (1 - share) * x + share * z
        yield x
