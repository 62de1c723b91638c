"""The Riemannian preconditioner of LoRA by its definition: dense matrices in float64, inverted."""

import numpy as np


def preconditioned(a, b, grad_a, grad_b, delta):
    """Both gradients of W + B A, of any number of dimensions, as arrays."""
    a, b, grad_a, grad_b = (
        np.asarray(x.detach(), dtype=np.float64) for x in (a, b, grad_a, grad_b)
    )
    rank = a.shape[0]
    rows, columns = a.reshape(rank, -1), b.reshape(b.shape[0], rank)
    for_a = np.linalg.inv(columns.T @ columns + delta * np.eye(rank))
    for_b = np.linalg.inv(rows @ rows.T + delta * np.eye(rank))
    return (
        (for_a @ grad_a.reshape(rank, -1)).reshape(grad_a.shape),
        (grad_b.reshape(-1, rank) @ for_b).reshape(grad_b.shape),
    )
