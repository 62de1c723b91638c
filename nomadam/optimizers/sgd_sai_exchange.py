"""States of other optimizers as SGDSaI takes them up, and its own as they read it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD

from nomadam.numerics.sharded import local
from nomadam.optimizers.sgd_sai_blocks import Block, Slot

LOGGER = logging.getLogger("nomadam")

# Of a group, what a state learns in training: of one that lacks it nothing has been learnt.
LEARNED = {"largest_gain": 0.0, "skipped_steps": 0, "rounding_step": 0, "refresh_step": 0}
# Of a group of torch's SGD, what means the same here.
OF_SGD = ("params", "param_names", "momentum", "nesterov", "maximize", "foreach", "differentiable")


def is_of_sgd(group: Mapping[str, Any]) -> bool:
    """Whether a group of a state dict is one of torch's SGD."""
    return "dampening" in group and "gain" not in group


def groups_to_load(
    theirs: Sequence[dict[str, Any]],
    ours: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The groups of a state dict with all of our options; torch compares their number."""
    if len(theirs) != len(ours):
        return list(theirs)
    made = []
    for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if is_of_sgd(their):
            LOGGER.warning(
                "group %d is of torch's SGD: its momentum is taken over, as an average; lr %g and "
                "weight_decay %g stay ours",
                index,
                float(our["lr"]),
                our["weight_decay"],
            )
            their = {key: their[key] for key in OF_SGD if key in their}
        own = {key: our[key] for key in defaults}
        made.append({**own, **LEARNED, **_by_name(their, our)})
    return made


def _by_name(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """A loaded group; gains by index become gains by name where only our parameters have names."""
    gain = theirs.get("gain")
    if "param_names" in theirs or "param_names" not in ours or not isinstance(gain, Mapping):
        return theirs
    names = zip(theirs["params"], ours["param_names"], strict=False)  # torch compares the lengths
    return {**theirs, "gain": {name: gain[i] for i, name in names if i in gain}}


def take_over(loaded: Mapping[str, Any], slots: Sequence[Slot], states: Any) -> set[Tensor]:
    """Makes averages of the momenta of torch's SGD, which are sums where it dampens less.

    Args:
        loaded: the state dict.
        slots: of our blocks, in its order.
        states: by parameter; the momenta are modified.

    Returns:
        The parameters whose momentum goes on, though their gain is still to be measured.
    """
    going_on = set()
    place = iter(slots)
    for group in loaded["param_groups"]:
        for slot in (next(place) for _ in group["params"]):
            buffer = states.get(slot.param, {}).get("momentum_buffer")
            if not is_of_sgd(group) or buffer is None:
                continue
            momentum, dampening = group["momentum"], group["dampening"]
            factor = (1 - momentum) / (1 - dampening) if dampening != 1 else 0.0
            # With 8 bits a factor of all values is one of the scales.
            scale = states[slot.param].get("momentum_scale")
            local(buffer if scale is None else scale).mul_(factor)
            going_on.add(slot.param)
    return going_on


def without_those_that_go_on(
    starts: dict[int, bool], waiting: Sequence[Block], going_on: set[Tensor]
) -> dict[int, bool]:
    """The blocks that start, without those whose momentum is there already."""
    for block in waiting if going_on else ():
        slot = block.slot
        if slot.param in going_on and starts.get(slot.index):
            del starts[slot.index]
            going_on.discard(slot.param)
    return starts


def sgd_state_dict(optimizer: Any) -> dict[str, Any]:
    """The state of an SGDSaI as ``torch.optim.SGD`` loads it, and goes on along the same steps.

    ```python
    params = [param for group in optimizer.param_groups for param in group["params"]]
    sgd = torch.optim.SGD([{"params": [param]} for param in params], lr=1.0)
    sgd.load_state_dict(nomadam.sgd_state_dict(optimizer))
    ```

    SGD has no gains: each block is a group of its own, with the learning rate ``lr * gain``, as if
    the gain were 1 where it is not measured yet. The decay is left out, for SGD's is coupled.

    Args:
        optimizer: an `SGDSaI` whose momentum is kept in the dtype of the parameters.

    Returns:
        A state dict with a group for each block, in their order: rates and momenta, as averages
        (``dampening = momentum``), with ``nesterov`` as the sums that torch has there.

    Raises:
        ValueError: for momentum in 8 bits, and for ``direction="sign"``.

    Examples:
        >>> import torch
        >>> from nomadam import SGDSaI
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> sgd = torch.optim.SGD([{"params": [p]}], lr=0.1)
        >>> sgd.load_state_dict(sgd_state_dict(SGDSaI([p])))
        >>> sgd.param_groups[0]["momentum"], sgd.param_groups[0]["dampening"]
        (0.9, 0.9)
    """
    held, gains = optimizer.state_dict(), optimizer.gains()
    if any("momentum_scale" in state for state in held["state"].values()):
        raise ValueError("torch's SGD can not read momentum in 8 bits: load it with float32 first")
    if any(group["direction"] != "momentum" for group in held["param_groups"]):
        raise ValueError("torch's SGD can not step along signs, as direction='sign' does")
    blank = SGD([Tensor()], lr=0.0, weight_decay=0.0, fused=None).defaults
    groups, state = [], {}
    for group in held["param_groups"]:
        names = group.get("param_names") or group["params"]
        # torch's Nesterov sums: what it steps along is longer by 1 / (1 - momentum).
        part = 1 - group["momentum"] if group["nesterov"] else 1.0
        for name, index in zip(names, group["params"], strict=True):
            factor = gains.get(name, 1.0) * part
            kept = {key: group[key] for key in OF_SGD if key in group and key != "params"}
            rates = {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
            own = {"param_names": [name]} if "param_names" in group else {}
            dampening = 0.0 if group["nesterov"] else group["momentum"]
            groups.append({**blank, **kept, **rates, **own, "dampening": dampening})
            groups[-1]["params"] = [index]
            buffer = held["state"].get(index, {}).get("momentum_buffer")
            if buffer is not None:  # a copy: torch would step the same tensor in both
                state[index] = {"momentum_buffer": buffer / part}
    return {"state": state, "param_groups": groups}
