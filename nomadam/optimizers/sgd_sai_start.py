"""The host's part of a step of SGD-SaI: state is made, new blocks get their gain."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nomadam.numerics.moments import Moments, moments_of, shares
from nomadam.numerics.rounding import Draw
from nomadam.numerics.sharded import all_agree, as_placed, is_sharded, local
from nomadam.optimizers.options import refuse_names
from nomadam.optimizers.sgd_sai_blocks import (
    Block,
    Plan,
    Slot,
    gain_dtype,
    gain_of,
    is_measured,
    is_refreshed,
    real,
)
from nomadam.optimizers.sgd_sai_sharded import placed_rows, whole
from nomadam.optimizers.sgd_sai_state import (
    is_stochastic,
    keeps_compensation,
    make_momentum,
)
from nomadam.optimizers.sgd_sai_update import Row


def make_block(slot: Slot, state: dict[str, Any]) -> Block:
    """A block that holds a gradient, of a sharded one its part; what its state lacks is made."""
    param, group = slot.param, slot.group
    if "gsnr" not in state:
        state["gsnr"] = torch.zeros((), dtype=gain_dtype(param), device="cpu")
    elif not state["gsnr"].is_cpu:  # moved along with the rest of the state
        state["gsnr"] = state["gsnr"].cpu()
    gain = state["gsnr"].item()
    starts = not gain > 0.0
    if group["momentum"] != 0.0 and state.get("momentum_buffer") is None:
        make_momentum(param, group["momentum_dtype"], state)
        starts = True  # or momentum was switched on in mid-course
    if not keeps_compensation(param, group["rounding"]):
        state.pop("compensation", None)  # of an earlier setting: it would be added again later
    elif "compensation" not in state:
        state["compensation"] = torch.zeros_like(param.detach())
    grad = param.grad
    assert grad is not None
    grad = local(as_placed(grad, param)) if is_sharded(param) else grad
    grad = grad.resolve_conj() if grad.is_conj() else grad
    remeasures = gain > 0.0 and is_refreshed(group)
    return Block(slot, grad, state, 0.0 if remeasures else gain, starts, remeasures)


def begin(
    waiting: Sequence[Block],
    joining: Sequence[Slot],
    states: Mapping[Any, dict[str, Any]],
    keep: Tensor | None,
    grad_scale: Tensor | None,
    plan: Plan,
) -> dict[int, bool]:
    """Measures the blocks that wait for an informative gradient or are due, and sets their gains.

    One host synchronisation, and where blocks are sharded a collective for each mesh.

    Args:
        waiting: blocks without a gain, without a momentum, or with a gain to be measured again,
            none of them empty here.
        joining: all sharded blocks that wait, whether they hold a gradient here or not: the same
            ones in every process of a mesh.
        states: of all blocks; one that is missing is made.
        keep: a bool tensor, False where this step is to change nothing.
        grad_scale: what the gradients are divided by.
        plan: of the whole step, so that blocks taken one by one are measured as together.

    Returns:
        By index, of the blocks that do not go on: True where the gradient is informative, so that
        they start; False where it is not finite, or ``keep`` is False, so that they are left alone.

    Raises:
        ValueError: listing the blocks without a gain in a mapping, before anything is changed.
    """
    lacking = {
        slot.name
        for slot in (block.slot for block in waiting)
        if isinstance(slot.group["gain"], Mapping) and slot.name not in slot.group["gain"]
    }
    refuse_names("gain lacks", lacking)
    # Numbers of the device that the host needs travel along, as the largest of one element.
    along = [] if keep is None else [keep.float()]
    along += [] if grad_scale is None else [grad_scale]
    grads = [real(block.grad.detach()) for block in waiting]
    known = shares([*grads, *along], plan.limit, plan.numel)
    if keep is not None and not moments_of(known[len(waiting)]).informative:
        return {block.slot.index: False for block in waiting if block.starts}
    scale = 1.0 if grad_scale is None else known[-1].largest
    here = {block.slot.index: share for block, share in zip(waiting, known, strict=False)}
    found = {index: moments_of(share) for index, share in (here | whole(joining, here)).items()}
    starts = {}
    for block in waiting:
        slot, measured = block.slot, found[block.slot.index]
        if block.starts and (measured.informative or measured.largest != 0.0):
            starts[slot.index] = measured.informative
        if measured.informative and (block.remeasures or not is_measured(block.state)):
            _set_gain(slot, block.state, measured, scale)
    for slot in joining:
        if starts.get(slot.index) is False and is_measured(states[slot.param]):
            # Its momentum was switched on in mid-course; where it has no gradient none was made.
            states[slot.param].pop("momentum_buffer", None)
            states[slot.param].pop("momentum_scale", None)
        # Of what is empty here, the processes that hold something have found the gain.
        if slot.index not in here and found[slot.index].informative:
            state = states[slot.param]
            _set_gain(slot, state, found[slot.index], scale)
            if slot.group["momentum"] != 0.0 and state.get("momentum_buffer") is None:
                make_momentum(slot.param, slot.group["momentum_dtype"], state)
    return starts


def _set_gain(slot: Slot, state: dict[str, Any], found: Moments, scale: float) -> None:
    gain = gain_of(slot.name, slot.group, found, slot.group["eps"] * scale)
    if "gsnr" not in state:
        state["gsnr"] = torch.zeros((), dtype=gain_dtype(slot.param), device="cpu")
    state["gsnr"].fill_(gain)


def count_skipped(
    grads: Sequence[Tensor], first: dict[str, Any], meshes: Sequence[Any] = ()
) -> Tensor | None:
    """Whether all gradients are finite, on the device; a step that is not is counted.

    Args:
        grads: all gradients of the step.
        first: the group that holds ``skipped_steps``.
        meshes: of the sharded parameters, whose processes have to agree.
    """
    grads = [real(grad.detach()) for grad in grads if grad.numel()]
    if not grads and not meshes:
        return None
    finite = [torch.linalg.vector_norm(grad, torch.inf).isfinite() for grad in grads]
    keep = torch.stack([one.to(finite[0].device) for one in finite]).all() if grads else None
    for mesh in meshes:
        keep = all_agree(mesh, torch.ones((), dtype=torch.bool) if keep is None else keep)
    assert keep is not None
    count = first["skipped_steps"]  # a number of the host is added without a transfer
    if isinstance(count, Tensor) and count.device == keep.device:
        count.add_(~keep)  # in place, for a captured graph
    else:
        on_device = isinstance(count, Tensor) and count.device.type != "cpu"
        first["skipped_steps"] = (count.to(keep.device) if on_device else count) + ~keep
    return keep


def draws_of(blocks: Sequence[Block], one_pass: bool, compiling: bool) -> dict[int, Draw]:
    """The draws of the blocks that need any, by index.

    The step is a number of the host, but a tensor where the update is traced, not to be a
    constant, and one on the device where a captured graph may replay the kernels.
    """
    draws: dict[int, Draw] = {}
    steps: dict[Any, Tensor] = {}  # one for all blocks of a group on a device
    for block in blocks:
        slot, group = block.slot, block.slot.group
        if "momentum_scale" not in block.state and not is_stochastic(slot.param, group):
            continue
        step = group["rounding_step"]
        if one_pass and slot.param.is_cuda and not isinstance(step, Tensor):
            step = group["rounding_step"] = torch.tensor(step, device=slot.param.device)
        if isinstance(step, Tensor):
            place = (id(group), slot.param.device)
            step = steps.setdefault(place, step.to(slot.param.device))
        elif compiling:
            step = torch.tensor(step, device="cpu")
        draws[slot.index] = Draw(group["seed"], step, slot.index)
    return draws


def rows_of(
    blocks: Sequence[Block], draws: Mapping[int, Draw], divisor: float, compiling: bool
) -> list[Row]:
    """Blocks of one group as the update takes them, all real."""
    rows = []
    for slot, grad, state, known, _, _ in blocks:
        param, group = local(slot.param), slot.group
        buffer = local(state["momentum_buffer"]) if group["momentum"] != 0.0 else None
        gain: Any = (known or state["gsnr"].item()) / divisor
        if compiling:  # a float of 0 would be a constant of the graph until the block starts
            gain = torch.tensor(gain, dtype=torch.float64, device="cpu")
        lost = (
            local(state["compensation"]) if keeps_compensation(param, group["rounding"]) else None
        )
        scale = None if buffer is None else local(state.get("momentum_scale"))
        scale = None if scale is None else scale.view(-1)
        stochastic, draw = is_stochastic(param, group), draws.get(slot.index)
        if param.is_complex():
            param, grad, buffer = real(param), real(grad), real(buffer)
        row = Row(param, grad, buffer, gain, scale, lost, draw, stochastic)
        rows += placed_rows(row, slot.param) if is_sharded(slot.param) else [row]
    return rows
