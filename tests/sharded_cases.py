"""What is tried with several processes at a time: each case runs in all of them, over gloo.

A case raises where something is wrong; `test_sharded.py` shows what it raised.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)

from nomadam import SGDSaI

# Even and uneven among 2, 3 and 4, with empty parts, and a single element.
SHAPES = {"even": (24, 6), "uneven": (5, 3), "few": (1, 4), "vector": (7,), "cube": (3, 4, 5)}
STEPS = 20


def gradients(step, shapes, dtype=torch.float64, mean=0.1):
    """The whole gradients of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)
        for name, shape in shapes.items()
    }


def parameters(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1234)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def sharded(tensors, mesh, placements):
    """Each tensor as a parameter laid out so; placements may be by name."""
    return {
        name: nn.Parameter(distribute_tensor(tensor, mesh, placed(placements, name)))
        for name, tensor in tensors.items()
    }


def placed(placements, name):
    return placements[name] if isinstance(placements, dict) else placements


def stepped(
    params, grads_of, steps=range(STEPS), optimizer=None, absent=lambda step: (), **options
):
    """Steps of an optimizer along given gradients, whole or laid out as the parameters are.

    Those that are absent in this process are laid out all the same, which takes all processes.
    """
    optimizer = optimizer or SGDSaI(params.items(), **options)
    for step in steps:
        for name, grad in grads_of(step).items():
            param = params[name]
            if isinstance(param, DTensor) and not isinstance(grad, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = None if name in absent(step) else grad
        optimizer.step()
    return optimizer


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(params, optimizer, reference_params, reference, exact):
    """Parameters, momentum, scales and gains against those of one process."""
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-12, "atol": 1e-12}
    for name, param in params.items():
        other = reference_params[name]
        torch.testing.assert_close(whole(param.detach()), other.detach(), **close, msg=None)
        ours, theirs = optimizer.state[param], reference.state[other]
        assert ours.keys() == theirs.keys(), (name, ours.keys(), theirs.keys())
        for key, value in ours.items():
            assert key == "gsnr" or isinstance(value, DTensor), (name, key)
            torch.testing.assert_close(whole(value), theirs[key], **close, msg=None)
    gains, theirs = optimizer.gains(), reference.gains()
    assert gains.keys() == theirs.keys()
    for name, gain in gains.items():
        assert gain == theirs[name] if exact else abs(gain / theirs[name] - 1) < 1e-12, name


def against_one_process(mesh, placements, *, exact, shapes=SHAPES, dtype=torch.float64, **options):
    def of(step):
        return gradients(step, shapes, dtype)

    start = parameters(shapes, dtype)
    alone = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    params = sharded(start, mesh, placements)
    reference = stepped(alone, of, **options)
    compare(params, stepped(params, of, **options), alone, reference, exact)


def line():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("line",))


def square():
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b"))


# One dimension


def rows_give_what_one_process_gives():
    for options in ({}, {"momentum": 0.0}, {"nesterov": True}, {"foreach": True}, {"fused": True}):
        against_one_process(line(), [Shard(0)], exact=False, **options)


def numbers_for_gains_give_the_same_bits():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            options |= {"gain": 3.0, "rounding": "nearest"}
            against_one_process(line(), [Shard(0)], exact=True, dtype=dtype, **options)


def replicas_change_nothing():
    against_one_process(line(), [Replicate()], exact=True)


def columns_give_what_one_process_gives():
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) > 1}
    against_one_process(line(), [Shard(1)], exact=False, shapes=shapes)


LOW = {
    "wide": (32, 256),
    "narrow": (40, 128),
    "conv": (16, 8, 4, 32),
    "odd": (96, 64),
    "small": (5, 3),
}


def low_precision_gives_the_same_bits():
    for placements in ([Shard(0)], {"wide": [Shard(1)] if two() else [Shard(0)]}):
        by_name = (
            {name: placed(placements, name) if name in placements else [Shard(0)] for name in LOW}
            if isinstance(placements, dict)
            else placements
        )
        for options in (
            {"rounding": "stochastic"},
            {"momentum_dtype": torch.bfloat16},
            {"momentum_dtype": "int8"},
            {"rounding": "kahan"},
        ):
            for path in ({"fused": True}, {"foreach": True}):
                against_one_process(
                    line(),
                    by_name,
                    exact=True,
                    shapes=LOW,
                    dtype=torch.bfloat16,
                    gain=3.0,
                    **options,
                    **path,
                )


def complex_blocks_give_the_same_bits():
    shapes = {"wide": (32, 128), "odd": (12, 5, 64), "small": (5, 3)}
    for options in (
        {"momentum_dtype": torch.bfloat16, "momentum": 0.9},
        {"momentum_dtype": "int8"},
        {"rounding": "stochastic", "momentum_dtype": torch.bfloat16},
    ):
        options |= {"gain": 3.0, "fused": False, "foreach": True}
        against_one_process(
            line(), [Shard(0)], exact=True, shapes=shapes, dtype=torch.complex64, **options
        )


def a_line_of_one_process_keeps_what_one_process_keeps():
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1))
    shapes = {"odd": (90, 64), "conv": (64, 64, 3, 3), "vector": (5000,)}
    against_one_process(
        mesh, [Replicate(), Shard(0)], exact=True, shapes=shapes, gain=3.0, momentum_dtype="int8"
    )


def two():
    return dist.get_world_size() == 2


def scales_that_would_be_cut_are_not_kept():
    shapes = {"odd": (90, 64), "conv": (64, 64, 3, 3), "columns": (32, 128 * 3)}
    placements = {"odd": [Shard(0)], "conv": [Shard(0)], "columns": [Shard(1)]}
    params = sharded(parameters(shapes), line(), placements)
    optimizer = stepped(params, lambda step: gradients(step, shapes), momentum_dtype="int8")
    size = dist.get_world_size()
    kept = {
        name: optimizer.state[param]["momentum_buffer"].dtype == torch.int8
        for name, param in params.items()
    }
    # 45 or 30 rows of 64, 32 or 16 rows of 576; 64 filters are not shared evenly among three.
    assert kept == {"odd": size == 3, "conv": size != 3, "columns": size == 3}, kept
    for name, param in params.items():
        found = optimizer.state[param]["momentum_buffer"].dtype
        assert found in (torch.int8, torch.bfloat16), name


# Who waits for whom


def counted(function):
    """How often the processes talk while a function runs."""
    calls = []
    names = ("all_gather_into_tensor", "all_reduce", "all_gather", "broadcast", "reduce_scatter")
    kept = {name: getattr(dist, name) for name in names}
    try:
        for name in names:
            setattr(dist, name, lambda *a, _of=name, **k: calls.append(_of) or kept[_of](*a, **k))
        function()
    finally:
        for name, original in kept.items():
            setattr(dist, name, original)
    return calls


def a_step_talks_once_and_then_never():
    params = sharded(parameters(SHAPES), line(), [Shard(0)])
    ready = [
        {
            name: distribute_tensor(grad, params[name].device_mesh, params[name].placements)
            for name, grad in gradients(step, SHAPES).items()
        }
        for step in range(3)
    ]
    optimizer = SGDSaI(params.items())

    def step(number):
        for name, grad in ready[number].items():
            params[name].grad = grad
        optimizer.step()

    assert counted(lambda: step(0)) == ["all_gather_into_tensor"]
    assert counted(lambda: (step(1), step(2))) == []


def a_gradient_that_is_missing_somewhere_is_waited_for():
    rank = dist.get_rank()
    params = sharded(parameters(SHAPES), line(), [Shard(0)])
    before = params["even"].detach().full_tensor().clone()

    def of(step):
        return gradients(step, SHAPES)

    def absent(step):
        return {"even"} if rank == 0 else ()

    optimizer = SGDSaI(params.items())
    stepped(params, of, range(2), optimizer, absent)
    assert "even" not in optimizer.gains() and "uneven" in optimizer.gains()
    assert torch.equal(params["even"].detach().full_tensor(), before)
    stepped(params, of, range(2, 3), optimizer)
    alone = {"even": nn.Parameter(before.clone())}
    reference = stepped(alone, lambda step: {"even": gradients(step, SHAPES)["even"]}, range(2, 3))
    assert abs(optimizer.gains()["even"] / reference.gains()["even"] - 1) < 1e-12


def what_a_process_has_whole_is_its_own_to_wait_for():
    """A replicated gradient that one process lacks must not change what the others send."""
    rank = dist.get_rank()
    params = sharded(parameters(SHAPES), line(), {name: [Shard(0)] for name in SHAPES}
                     | {"vector": [Replicate()]})  # fmt: skip
    optimizer = SGDSaI(params.items())

    def zero_at_first(step):
        found = gradients(step, SHAPES)
        return {name: grad * (step > 2 or name == "vector") for name, grad in found.items()}

    stepped(params, zero_at_first, range(4), optimizer, lambda _: {"vector"} if rank else ())
    assert set(optimizer.gains()) == set(SHAPES) - ({"vector"} if rank else set())


def what_is_empty_or_frozen_keeps_no_one_talking():
    shapes = {"even": (24, 6), "frozen": (8, 2), "empty": (0, 4)}
    params = sharded(parameters(shapes), line(), [Shard(0)])
    params["frozen"].requires_grad_(False)
    optimizer = SGDSaI(params.items())

    def absent(step):
        return {"frozen"}

    stepped(params, lambda step: gradients(step, shapes), range(1), optimizer, absent)
    for param in params.values():
        assert param is params["frozen"] or param.grad is not None
    assert counted(optimizer.step) == []
    params["frozen"].requires_grad_(True)  # thawed
    stepped(params, lambda step: gradients(step, shapes), range(1, 2), optimizer)
    assert set(optimizer.gains()) == {"even", "frozen"}


def momentum_switched_on_waits_for_a_gradient_everywhere():
    rank = dist.get_rank()
    params = sharded(parameters(SHAPES), line(), [Shard(0)])
    optimizer = SGDSaI(params.items(), momentum=0.0)

    def of(step):
        return gradients(step, SHAPES)

    stepped(params, of, range(1), optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    stepped(params, of, range(1, 4), optimizer, lambda _: {"even"} if rank == 1 else ())
    assert "momentum_buffer" not in optimizer.state[params["even"]]
    stepped(params, of, range(4, 5), optimizer)
    assert "momentum_buffer" in optimizer.state[params["even"]]


def zero_gradients_before_the_first_step_harm_nothing():
    def of(step):
        grads = gradients(step, SHAPES)
        return {n: torch.zeros_like(g) for n, g in grads.items()} if step == 0 else grads

    start = parameters(SHAPES)
    alone = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    params = sharded(start, line(), [Shard(0)])
    ours, theirs = SGDSaI(params.items(), lr=0.0), SGDSaI(alone.items(), lr=0.0)
    for optimizer, these in ((ours, params), (theirs, alone)):
        stepped(these, of, range(1), optimizer)
        optimizer.param_groups[0]["lr"] = 1e-2
        stepped(these, of, range(1, 5), optimizer)
    compare(params, ours, alone, theirs, exact=False)


def one_process_that_overflows_stops_all():
    params = sharded(parameters(SHAPES), line(), [Shard(0)])
    optimizer = SGDSaI(params.items(), skip_nonfinite=True)
    stepped(params, lambda step: gradients(step, SHAPES), range(2), optimizer)
    before = {name: param.detach().full_tensor().clone() for name, param in params.items()}

    def of(step):
        grads = gradients(step, SHAPES)
        grads["even"][-1, -1] = torch.inf  # in the last process alone
        return grads

    stepped(params, of, range(2, 3), optimizer)
    for name, param in params.items():
        assert torch.equal(param.detach().full_tensor(), before[name]), name
    assert optimizer.skipped_steps == 1


def sums_that_are_not_taken_yet_are_taken():
    mesh, size = line(), dist.get_world_size()
    start = parameters(SHAPES)
    params = sharded(start, mesh, [Shard(0)])
    alone = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}

    def of(step):
        return {
            name: DTensor.from_local(grad / size, mesh, [Partial()])
            for name, grad in gradients(step, SHAPES).items()
        }

    reference = stepped(alone, lambda step: gradients(step, SHAPES))
    compare(params, stepped(params, of), alone, reference, exact=False)


def gains_are_measured_again_where_they_are_due():
    against_one_process(line(), [Shard(0)], exact=False, refresh=3)
    against_one_process(line(), [Shard(0)], exact=False, normalize=True)


# Two dimensions: with four processes


def replicated_shards_are_counted_once():
    against_one_process(square(), [Replicate(), Shard(0)], exact=False)


def shards_of_shards():
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) > 1}
    against_one_process(square(), [Shard(0), Shard(1)], exact=False, shapes=shapes)
    against_one_process(square(), [Shard(1), Shard(0)], exact=False, shapes=shapes)
    mixed = {name: [Shard(0), Shard(1)] for name in shapes} | {"vector": [Shard(0), Replicate()]}
    against_one_process(square(), mixed, exact=False, shapes=shapes | {"vector": (7,)})


LINE = (
    rows_give_what_one_process_gives,
    numbers_for_gains_give_the_same_bits,
    replicas_change_nothing,
    columns_give_what_one_process_gives,
    low_precision_gives_the_same_bits,
    complex_blocks_give_the_same_bits,
    a_line_of_one_process_keeps_what_one_process_keeps,
    scales_that_would_be_cut_are_not_kept,
    a_step_talks_once_and_then_never,
    a_gradient_that_is_missing_somewhere_is_waited_for,
    what_a_process_has_whole_is_its_own_to_wait_for,
    what_is_empty_or_frozen_keeps_no_one_talking,
    momentum_switched_on_waits_for_a_gradient_everywhere,
    zero_gradients_before_the_first_step_harm_nothing,
    one_process_that_overflows_stops_all,
    sums_that_are_not_taken_yet_are_taken,
    gains_are_measured_again_where_they_are_due,
)
SQUARE = (replicated_shards_are_counted_once, shards_of_shards)


def cases(size):
    return LINE + (SQUARE if size == 4 else ())
