"""The rule of SGD-SaI as an optax transformation, for JAX: `sgd_sai(lr)` equals nomadam.SGDSaI.

Run it as `python examples/optax_gain.py`; it needs jax and optax, and nothing of nomadam.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SGDSaIState(NamedTuple):
    """Trees like the parameters': gain of each block, 0 while not measured, and momentum."""

    gain: Any
    momentum: Any
    count: jax.Array


def gain_of(gradient):
    """|g| / std(g), at most the block's number of elements, and 1 for a block of one element."""
    gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    if gradient.size <= 1:  # an empty block has no gain to find either, and never starts
        return jnp.ones((), gradient.dtype)
    scaled = gradient / jnp.abs(gradient).max()  # the gain has no scale, and so nothing overflows
    gain = jnp.linalg.norm(scaled.ravel()) / jnp.std(scaled, ddof=1)
    return jnp.minimum(gain, float(gradient.size))  # also where the deviation is 0


def sgd_sai(learning_rate=1e-2, momentum=0.9, weight_decay=1e-2):
    """SGD-SaI: each block's step is scaled once, by its first informative gradient.

    Args:
        learning_rate: at least 0; a float, or a schedule from the number of the step to one.
        momentum: coefficient of the moving average, in [0, 1). It starts at that first gradient.
        weight_decay: decoupled decay, at least 0: a step takes `learning_rate * weight_decay` of
            the parameter, whatever the gain. For blocks that are not to decay make a second
            transformation, and give both to `optax.partition`; not to `optax.masked`, which hands
            on the bare gradient of what it leaves out.

    Returns:
        An `optax.GradientTransformation`; its `update` needs the parameters.

    Raises:
        ValueError: where a number is outside its range.
    """
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    for name, rate in rates.items():  # a traced array has no value yet
        if isinstance(rate, int | float) and not 0 <= rate < float("inf"):
            raise ValueError(f"{name}={rate}: it is finite and at least 0")
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: it is in [0, 1)")

    def init(params):
        wide = functools.partial(jnp.promote_types, jnp.float32)
        gains = jax.tree.map(lambda p: jnp.zeros((), wide(p.dtype)), params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SGDSaIState(gains, zeros, jnp.zeros((), jnp.int32))

    def step_of(gradient, param, gain, buffer, lr):
        finite = jnp.isfinite(gradient).all()
        starts = (gain == 0) & finite & (gradient != 0).any()
        # Where it does not start, a gradient of ones stands in, so that nothing is divided by 0.
        measured = gain_of(jnp.where(starts, gradient, jnp.ones_like(gradient)))
        gain = jnp.where(starts, measured, gain).astype(gain.dtype)  # the state keeps its dtypes
        average = momentum * buffer + (1 - momentum) * gradient
        waits = (gain == 0) & ~starts
        started = jnp.where(waits, buffer, average)
        buffer = jnp.where(starts, gradient, started).astype(buffer.dtype)
        step = -lr * (gain * buffer + weight_decay * param)
        return jnp.where(waits & ~finite, jnp.zeros_like(step), step), gain, buffer

    def update(gradients, state, params=None):
        if params is None:
            raise ValueError("sgd_sai decays the parameters: call update(gradients, state, params)")
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        leaves, tree = jax.tree.flatten(gradients)
        trees = params, state.gain, state.momentum
        others = [tree.flatten_up_to(other) for other in trees]
        stepped = [step_of(*of_block, lr) for of_block in zip(leaves, *others, strict=True)]
        steps, gains, buffers = (tree.unflatten(each) for each in zip(*stepped, strict=True))
        return steps, SGDSaIState(gains, buffers, state.count + 1)

    return optax.GradientTransformation(init, update)


def main(steps=20):
    """Learns a parabola; returns the parameters and the loss of each step."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "inner": jax.random.normal(keys[0], (8, 64)) / 8**0.5,
        "bias": jnp.zeros(64),
        "outer": jax.random.normal(keys[1], (64, 1)) / 64**0.5,
    }
    x = jax.random.uniform(keys[2], (64, 8))
    y = jnp.square(x).sum(axis=1, keepdims=True)

    def loss_of(params):
        predicted = jax.nn.gelu(x @ params["inner"] + params["bias"]) @ params["outer"]
        return jnp.square(predicted - y).mean()

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), sgd_sai(1e-2))
    state = optimizer.init(params)
    losses = []
    for _ in range(steps):
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return params, losses


if __name__ == "__main__":
    losses = main()[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}")
