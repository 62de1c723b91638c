"""The optax transformation of the example against SGDSaI, on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_gain
import pytest
import torch

from nomadam import SGDSaI

PACKAGES = ("jax", "optax")
SHAPES = {"matrix": (6, 5), "vector": (7,), "late": (4, 3), "one": (1,), "constant": (3,)}
CLOSE = {"float32": 1e-5, "float64": 1e-12}


def gradient(name, step, dtype):
    """`late` begins with zeros, and `broken` is not finite before it begins."""
    if name == "late" and step < 2:
        return np.zeros(SHAPES[name], dtype)
    if name == "late" and step == 2:
        return np.full(SHAPES[name], np.nan, dtype)
    if name == "constant":
        return np.full(SHAPES[name], 0.5, dtype)
    generator = torch.Generator().manual_seed(100 * step + len(name))
    drawn = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64) + 0.3
    return (drawn * 10.0 ** (len(name) - 5)).numpy().astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_trains_as_sgd_sai(dtype, scheduled):
    close = CLOSE[dtype]
    with jax.enable_x64(dtype == "float64"):
        start = {
            name: np.linspace(-1, 1, np.prod(s)).reshape(s).astype(dtype)
            for name, s in SHAPES.items()
        }
        named = [(name, torch.nn.Parameter(torch.tensor(start[name]))) for name in SHAPES]
        ours = SGDSaI(named, lr=2e-2, momentum=0.8, weight_decay=0.1)
        rate = (lambda step: 2e-2 * 0.9**step) if scheduled else 2e-2
        theirs = optax_gain.sgd_sai(rate, momentum=0.8, weight_decay=0.1)
        params = jax.tree.map(jnp.asarray, start)
        state = theirs.init(params)
        update = jax.jit(theirs.update)
        for step in range(20):
            gradients = {name: gradient(name, step, dtype) for name in SHAPES}
            updates, state = update(jax.tree.map(jnp.asarray, gradients), state, params)
            params = optax.apply_updates(params, updates)
            ours.param_groups[0]["lr"] = rate(step) if scheduled else rate
            for name, param in named:
                param.grad = torch.tensor(gradients[name])
            ours.step()
        gains = {name: float(gain) for name, gain in state.gain.items()}
        assert gains == pytest.approx(ours.gains(), rel=close)
        for name, param in named:
            np.testing.assert_allclose(params[name], param.detach(), rtol=close, atol=close)


def test_trains_a_network():
    params, losses = optax_gain.main(20)
    assert losses[-1] < losses[0] / 2


def test_resumes_from_its_state():
    """The state is a tree of arrays, for any library that keeps such."""
    optimizer = optax_gain.sgd_sai()
    params = {"matrix": jnp.ones((6, 5))}

    def steps(state, numbers):
        for step in numbers:
            gradients = {"matrix": gradient("matrix", step, "float32")}
            updates, state = optimizer.update(gradients, state, params)
        return updates, state

    start = optimizer.init(params)
    half = steps(start, range(10))[1]
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(half)]
    again = jax.tree.unflatten(jax.tree.structure(start), kept)
    ours, expected = steps(again, range(10, 20)), steps(start, range(20))
    assert jax.tree.all(jax.tree.map(lambda one, other: (one == other).all(), ours, expected))


def test_needs_the_parameters():
    optimizer = optax_gain.sgd_sai()
    gradients = {"matrix": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="decays the parameters"):
        optimizer.update(gradients, optimizer.init(gradients))


def test_an_empty_block_waits():
    optimizer = optax_gain.sgd_sai()
    params = {"empty": jnp.ones((0, 3)), "vector": jnp.arange(3.0)}
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert updates["empty"].shape == (0, 3)
    assert state.gain["empty"] == 0 < state.gain["vector"]


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_state_keeps_its_dtypes(dtypes):
    """Also within a scan, with gradients of another dtype than the parameters."""
    optimizer = optax_gain.sgd_sai()
    params = {"matrix": jnp.ones((6, 5), dtypes[0])}
    gradients = {"matrix": jnp.asarray(gradient("matrix", 0, "float32"), dtypes[1])}

    def step(carried, _):
        params, state = carried
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    (found, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
    assert found["matrix"].dtype == state.momentum["matrix"].dtype == dtypes[0]
    assert state.gain["matrix"] > 0


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": -1.0}, {"weight_decay": float("nan")}, {"momentum": 1.5}, {"momentum": 1}],
)
def test_numbers_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        optax_gain.sgd_sai(**wrong)


def test_a_partition_leaves_out_the_decay():
    params = {"matrix": jnp.ones((6, 5)), "vector": jnp.ones(7)}
    decays = {True: optax_gain.sgd_sai(), False: optax_gain.sgd_sai(weight_decay=0.0)}
    optimizer = optax.partition(decays, {"matrix": True, "vector": False})
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -1e-4, rtol=1e-5)
    assert not updates["vector"].any()


def test_hyperparameters_can_be_injected():
    """Where the numbers are traced, and have no values to look at."""
    optimizer = optax.inject_hyperparams(optax_gain.sgd_sai)(learning_rate=0.1)
    params = {"matrix": jnp.arange(6.0)}
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    expected, _ = optax_gain.sgd_sai(0.1).update(params, optax_gain.sgd_sai().init(params), params)
    np.testing.assert_allclose(updates["matrix"], expected["matrix"], rtol=1e-5)
