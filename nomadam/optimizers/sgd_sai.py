"""SGD-SaI: SGD with momentum, its learning rate scaled per block by the first gradient's g-SNR."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _default_to_fused_or_foreach,
    _use_grad_for_differentiable,
)

from nomadam.numerics.moments import moments
from nomadam.optimizers.options import check_options, pick_gains, plain_numbers, refuse_names
from nomadam.optimizers.sgd_sai_blocks import (
    Block,
    by_name,
    divisor,
    gain_dtype,
    gain_of,
    is_measured,
    learning_rate,
    momentum_dtype,
    real,
)
from nomadam.optimizers.sgd_sai_update import update_foreach, update_one

Gain = str | float | Mapping[str | int, float]


class SGDSaI(Optimizer):
    r"""SGD with momentum whose step is scaled once per block, by the g-SNR of its first gradient.

    A block is one parameter tensor. At its first informative gradient g (present, finite, not all
    zero) its gain is measured and its momentum starts. Every step is

    ```text
    m <- g                                   at that first gradient
    m <- momentum * m + (1 - momentum) * g   afterwards
    p <- p - lr * weight_decay * p
    p <- p - lr * gain * m                   gain = |g| / (std(g) + eps) of the first gradient
    ```

    The deviation is the unbiased one over the entries of the block. The gain is 1 for a block of
    one element, never above the block's number of (real) elements and never non-finite; elsewhere
    it is the formula of the released code, whose trajectory ``eps=1e-8`` gives. It is measured in
    float32 or wider and, with ``eps=0``, does not depend on the scale of the loss. Before its first
    informative gradient a block is only decayed (gradient all zero) or left alone (gradient
    ``None`` or not finite). So zero-initialised LoRA factors and gates, late-unfrozen layers,
    unrouted experts and groups that are added later get their gain when they start to learn. A step
    at a learning rate of 0 measures too.

    Args:
        params: parameters, named parameters or groups, as for any ``torch.optim`` optimizer.
        lr: learning rate, finite and >= 0; a float or a one-element tensor. Default 1e-2.
        momentum: coefficient of the moving average, in [0, 1); 0 keeps no buffer. Default 0.9.
        weight_decay: decoupled decay, >= 0: a step takes ``lr * weight_decay`` of the parameter,
            whatever the gain. Default 1e-2.
        eps: added to the deviation in the gain, in units of the gradient, >= 0. Default 0.
        gain: ``"gsnr"`` measures it; ``"sqrt_numel"`` takes the square root of the block's number
            of elements, which the measured one nearly always is; a positive number holds for every
            block; a mapping gives a number for each parameter name (index where unnamed).
        normalize: divide all gains by the largest, as Algorithm 1 of the paper does. The divisor is
            settled once, over the blocks that the first measuring step starts; blocks that start
            later are divided by the same number, so theirs may exceed 1.
        nesterov: step along ``momentum * m + (1 - momentum) * g`` instead of m.
        maximize: ascend.
        foreach: many tensors a kernel. Default: where torch does so (not on CPU).
        fused: ``None`` or ``False``: this release has no fused kernel.
        differentiable: let autograd run through the step; the gain counts as a constant.
        skip_nonfinite: a step in which any gradient has a non-finite element changes nothing and
            adds one to `skipped_steps`; decided on the device, without a synchronisation.

    State of a block: ``momentum_buffer`` (the parameter's dtype; float32 for float16) and ``gsnr``,
    a 0-d tensor on the CPU (float64 for float64 blocks, else float32), 0 while not measured. The
    host waits for the device once in a step with unmeasured gradients, and never otherwise.

    Raises:
        ValueError: for an argument outside its range, for ``fused=True``, and for a mapping with
            missing or unknown names, which it lists.
        RuntimeError: from ``step`` for sparse gradients, before anything is changed.

    Source: Xu et al., *No More Adam*, arXiv 2412.11768, Algorithm 1 (with ``normalize=True``), and
    the released code (without).

    Examples:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = SGDSaI(model.named_parameters(), lr=1e-2)
        >>> model(torch.eye(4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.gains()["bias"]
        1.0
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        eps: float = 0.0,
        gain: Gain = "gsnr",
        normalize: bool = False,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        """Checks the options and makes the groups."""
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "gain": dict(gain) if isinstance(gain, Mapping) else gain,
            "normalize": normalize,
            "largest_gain": 0.0,  # the divisor of normalize, 0 until it is settled
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
            "skip_nonfinite": skip_nonfinite,
            "skipped_steps": 0,
        }
        check_options(defaults)
        super().__init__(params, defaults)
        if isinstance(gain, Mapping):
            pick_gains(gain, {name: param for name, param, _ in self._blocks()}, all_known=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does, or raises ValueError for its options and adds none."""
        own_gain = isinstance(param_group, dict) and "gain" in param_group
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_options(group)
            group.update(plain_numbers(group))
            if isinstance(group["gain"], Mapping):
                own = {name: param for name, param, owner in self._blocks() if owner is group}
                group["gain"] = pick_gains(group["gain"], own, all_known=own_gain)
        except ValueError:
            self.param_groups.pop()
            raise

    def gains(self) -> dict[str | int, float]:
        """The number that multiplies each block's step, by parameter name, or index where unnamed.

        Blocks that are not measured yet are left out. Reads no device.
        """
        return {
            name: float(self.state[param]["gsnr"]) / divisor(group)
            for name, param, group in self._blocks()
            if is_measured(self.state.get(param, {}))
        }

    @property
    def skipped_steps(self) -> int:
        """Number of steps that ``skip_nonfinite`` left out, saved with the state. Synchronises."""
        return int(self.param_groups[0]["skipped_steps"])

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step along the gradients that the parameters hold.

        Args:
            closure: evaluates the model and returns the loss, which ``step`` returns then; called
                once, with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiling = torch.compiler.is_compiling()
        limit = None if compiling else self._slice_limit()
        for tensors, foreach, options in self._prepare(compiling):
            if foreach:
                update_foreach(*tensors, **options, limit=limit)
            else:
                for param, grad, momentum_buffer, gain in zip(*tensors, strict=True):
                    update_one(param, grad, momentum_buffer, gain, **options)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, also that of an older version or of the released ``sgd-sai``.

        Options that it lacks keep the constructor's values. Momentum and gain keep their own dtypes
        whatever the parameters' is; a gain that is 0 or not finite counts as not measured.
        """
        loaded: dict[str, Any] = {}

        # Hooks around torch's own loading, which casts every state tensor to its parameter's dtype.
        def remember(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded.update(saved)
            groups = saved["param_groups"]
            if len(groups) == len(self.param_groups):
                learned = {"largest_gain": 0.0, "skipped_steps": 0}
                groups = [
                    {k: learned.get(k, ours[k]) for k in self.defaults} | by_name(theirs, ours)
                    for ours, theirs in zip(self.param_groups, groups, strict=True)
                ]
            return {**saved, "param_groups": groups}

        def restore(_: Optimizer) -> None:
            indices = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for i, param in zip(indices, params, strict=True):
                if i in loaded["state"]:
                    self._restore_block(param, loaded["state"][i])
            self._settle_largest_gain()

        handles = [
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled optimizer; options that it lacks take the constructor's values."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _restore_block(self, param: Tensor, saved: Mapping[str, Any]) -> None:
        state = self.state[param]
        state.clear()  # what another optimizer kept is not carried along
        if isinstance(saved.get("momentum_buffer"), Tensor):
            state["momentum_buffer"] = saved["momentum_buffer"].to(
                device=param.device, dtype=momentum_dtype(param), copy=True
            )
        if saved.get("gsnr") is not None:
            number = float(saved["gsnr"])
            number = number if 0.0 < number < math.inf else 0.0
            state["gsnr"] = torch.tensor(number, dtype=gain_dtype(param), device="cpu")

    def _blocks(self) -> Iterator[tuple[str | int, Tensor, dict[str, Any]]]:
        """Name (unnamed: index, as in a state dict), parameter and group of every block."""
        index = 0
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                yield group["param_names"][i] if "param_names" in group else index, param, group
                index += 1

    def _init_group(self, group: dict[str, Any]) -> list[Block]:
        """The blocks of a group that have a gradient, their state made where it is missing."""
        blocks = []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            state = self.state[param]
            starts = not is_measured(state)
            if "gsnr" not in state:
                state["gsnr"] = torch.zeros((), dtype=gain_dtype(param), device="cpu")
            elif state["gsnr"].device.type != "cpu":  # moved along with the rest of the state
                state["gsnr"] = state["gsnr"].cpu()
            if group["momentum"] != 0.0 and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(
                    param, dtype=momentum_dtype(param), memory_format=torch.preserve_format
                ).detach()
                starts = True  # or momentum was switched on in mid-course
            momentum_buffer = state["momentum_buffer"] if group["momentum"] != 0.0 else None
            blocks.append(Block(param, grad.resolve_conj(), momentum_buffer, state, starts))
        return blocks

    @torch._disable_dynamo
    def _prepare(self, compiling: bool) -> list[tuple[list[list[Any]], bool, dict[str, Any]]]:
        """Makes state, starts new blocks, and says which tensors are to be updated, and how.

        Not traced: whether a block is measured is a fact of the host. So the gains are numbers of
        the host too: floats, or 0-d tensors where the update is traced, not to be specialised.
        """
        grads = [param.grad for _, param, _ in self._blocks()]
        if any(grad is not None and grad.layout != torch.strided for grad in grads):
            raise RuntimeError("SGDSaI does not support sparse gradients: ask for dense ones")
        groups = [(group, self._init_group(group)) for group in self.param_groups]
        keep = self._count_nonfinite([block.grad for _, blocks in groups for block in blocks])
        waiting = [
            (group, block)
            for group, blocks in groups
            for block in blocks
            if block.starts and block.grad.numel()
        ]
        untouched = self._begin(waiting, keep) if waiting else set()
        self._settle_largest_gain()
        work = []
        for group, blocks in groups:
            blocks = [block for block in blocks if id(block.state) not in untouched]
            params = [real(block.param) for block in blocks]
            grads = [real(block.grad) for block in blocks]
            momentum_buffers = [real(block.momentum_buffer) for block in blocks]
            gains = [float(block.state["gsnr"]) / divisor(group) for block in blocks]
            if compiling:  # a float of 0 would be a constant of the graph until the block starts
                gains = [torch.tensor(gain, dtype=torch.float64, device="cpu") for gain in gains]
            foreach = group["foreach"]
            if foreach is None:
                _, foreach = _default_to_fused_or_foreach(params, group["differentiable"])
            options = {k: group[k] for k in ("momentum", "weight_decay", "nesterov", "maximize")}
            options |= {"lr": learning_rate(group, compiling), "keep": keep}
            work.append(([params, grads, momentum_buffers, gains], foreach, options))
        return work

    def _begin(self, waiting: list[tuple[dict[str, Any], Block]], keep: Tensor | None) -> set[int]:
        """Starts the blocks whose gradient is informative: their gain and their momentum.

        One host synchronisation. Returns the blocks (ids of their states) to be left alone.
        """
        grads = [real(block.grad.detach()) for _, block in waiting]
        names = {id(param): name for name, param, _ in self._blocks()}
        lacking = {
            names[id(block.param)]
            for group, block in waiting
            if isinstance(group["gain"], Mapping) and names[id(block.param)] not in group["gain"]
        }
        refuse_names("gain lacks", lacking)
        if keep is None:
            measured = moments(grads, self._slice_limit())
        else:  # travels along: informative is what a scalar 1 is, and a 0 is not
            *measured, kept = moments([*grads, keep.float()], self._slice_limit())
            if not kept.informative:
                return {id(state) for state in self.state.values()}
        untouched = set()
        for (group, block), found in zip(waiting, measured, strict=True):
            if found.informative:
                if not is_measured(block.state):
                    gain = gain_of(names[id(block.param)], group, found)
                    block.state["gsnr"].fill_(gain)
                if block.momentum_buffer is not None:
                    block.momentum_buffer.copy_(block.grad)
                    if group["maximize"]:
                        block.momentum_buffer.neg_()
            elif found.largest != 0.0:
                untouched.add(id(block.state))
        return untouched

    def _count_nonfinite(self, grads: list[Tensor]) -> Tensor | None:
        """Whether this step is to be kept, on the device, where ``skip_nonfinite`` asks for it."""
        grads = [real(grad.detach()) for grad in grads if grad.numel()]
        if not grads or not any(group["skip_nonfinite"] for group in self.param_groups):
            return None
        finite = [torch.linalg.vector_norm(grad, math.inf).isfinite() for grad in grads]
        keep = torch.stack([one.to(finite[0].device) for one in finite]).all()
        first = self.param_groups[0]
        count = first["skipped_steps"]  # a number of the host is added without a transfer
        on_device = isinstance(count, Tensor) and count.device.type != "cpu"
        first["skipped_steps"] = (count.to(keep.device) if on_device else count) + ~keep
        return keep

    def _settle_largest_gain(self) -> None:
        """Fixes the divisor of ``normalize``, once, for all groups."""
        if not any(group["normalize"] for group in self.param_groups):
            return
        largest = max(group["largest_gain"] for group in self.param_groups)
        if largest == 0.0:
            measured = [state["gsnr"] for state in self.state.values() if is_measured(state)]
            largest = max(map(float, measured), default=0.0)
        for group in self.param_groups:
            group["largest_gain"] = largest

    def _slice_limit(self) -> int:
        """Elements of a temporary: four in float32 are 0.8 % of bfloat16 parameters."""
        numel = sum(p.numel() for group in self.param_groups for p in group["params"])
        return max(2**15, numel // 1000)
