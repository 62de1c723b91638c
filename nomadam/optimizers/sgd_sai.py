"""SGD-SaI: SGD with momentum, its learning rate scaled per block by the first gradient's g-SNR."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from nomadam.numerics.rounding import Draw
from nomadam.optimizers.flat_parameters import refuse_flat, shapes_of
from nomadam.optimizers.options import check_options, named_dtype, pick_gains, plain_numbers
from nomadam.optimizers.sgd_sai_blocks import (
    Block,
    Plan,
    Slot,
    divisor,
    is_a_step,
    is_measured,
    learning_rate,
)
from nomadam.optimizers.sgd_sai_exchange import (
    groups_to_load,
    take_over,
    without_those_that_go_on,
)
from nomadam.optimizers.sgd_sai_fused import check_fused, one_pass_pays, path_for, update_fused
from nomadam.optimizers.sgd_sai_sharded import joining, meshes_of
from nomadam.optimizers.sgd_sai_start import begin, count_skipped, draws_of, make_block, rows_of
from nomadam.optimizers.sgd_sai_state import restore_block
from nomadam.optimizers.sgd_sai_update import Options, Row, update_forloop

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
        refresh: with ``gain="gsnr"``, measure every gain again from the gradient of each
            ``refresh``-th step after the first, an integer >= 1, without smoothing; a gradient that
            is not informative leaves the gain as it is. Default ``None``: once for all.
        direction: ``"momentum"``, or ``"sign"``: step along the sign of it, element by element.
        nesterov: step along ``momentum * m + (1 - momentum) * g`` instead of m.
        maximize: ascend.
        foreach: many tensors a kernel. Default: where torch does so (not on CPU).
        fused: one pass over memory, by a Triton kernel on CUDA and a compiled loop on the CPU,
            whatever the dtypes; what is not contiguous takes the foreach path. Default: wherever
            it is the fastest: on CUDA, and on the CPU from 10 million elements on, or 100 thousand
            where anything is kept in low precision. ``torch.compile`` makes its own kernels.
        differentiable: let autograd run through the step; the gain counts as a constant.
        skip_nonfinite: a step in which any gradient has a non-finite element changes nothing and
            adds one to `skipped_steps`; decided on the device, without a synchronisation.
        momentum_dtype: of the stored momentum: ``None`` for the parameter's (float32 for float16),
            ``torch.float32``, ``torch.bfloat16`` or ``"int8"``, with a scale for 128 elements and
            in blocks of 4096 elements or more (see `nomadam.numerics.blockwise`).
        rounding: of bfloat16 parameters and momentum: ``"auto"`` and ``"stochastic"`` (unbiased,
            so that no update is too small to count), ``"nearest"`` (which loses small updates) or
            ``"kahan"`` (nearest, and what was lost is kept in 2 more bytes a parameter).
        seed: of the random bits, an integer in [0, 2^64). They depend on it, on the block's index,
            the step and the element alone, whatever path or device takes the step.

    Sharded parameters (``DTensor``: FSDP2, HSDP, tensor parallelism) have the gains of the whole
    tensors, from one small collective a mesh dimension while blocks wait to be measured and none
    afterwards; parameters that an engine has flattened into vectors are refused.

    State of a block: ``momentum_buffer``, its ``momentum_scale`` (with int8), ``compensation``
    (with kahan), and ``gsnr``, a 0-d tensor on the CPU (float64 for float64 blocks, else float32),
    0 while not measured. The host waits for the device once in a step that measures gradients, and
    never otherwise.

    Raises:
        ValueError: for an argument outside its range, for a mapping with missing or unknown names,
            which it lists, and for flattened parameters, also from ``step``, with the way out.
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

    steps_alone = True  # the step of a block depends on no other block's gradient, by default

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
        refresh: int | None = None,
        direction: str = "momentum",
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        skip_nonfinite: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        rounding: str = "auto",
        seed: int = 0,
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
            "refresh": refresh,
            "refresh_step": 0,  # of the steps that refresh counts
            "direction": direction,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
            "skip_nonfinite": skip_nonfinite,
            "skipped_steps": 0,
            "momentum_dtype": named_dtype(momentum_dtype),
            "rounding": rounding,
            "seed": seed,
            "rounding_step": 0,  # of the draws, counted in steps
        }
        check_options(defaults)
        self._shapes: list[list[torch.Size]] = []  # of blocks: engines may flatten them
        self._going_on: set[Tensor] = set()  # blocks whose momentum is another optimizer's
        super().__init__(params, defaults)
        # Then GradScaler hands the scale over, and the step divides by it.
        self._step_supports_amp_scaling = bool(fused)
        if isinstance(gain, Mapping):
            pick_gains(gain, {slot.name: slot.param for slot in self._slots()}, all_known=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does, or raises ValueError for its options and adds none."""
        own_gain = isinstance(param_group, dict) and "gain" in param_group
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            group["momentum_dtype"] = named_dtype(group["momentum_dtype"])
            check_options(group)
            check_fused(group)
            refuse_flat([group], [shapes_of(group)])
            group.update(plain_numbers(group))
            if isinstance(group["gain"], Mapping):
                own = {slot.name: slot.param for slot in self._slots() if slot.group is group}
                group["gain"] = pick_gains(group["gain"], own, all_known=own_gain)
        except ValueError:
            self.param_groups.pop()
            raise
        self._shapes.append(shapes_of(self.param_groups[-1]))

    def gains(self) -> dict[str | int, float]:
        """The number that multiplies each block's step, by parameter name, or index where unnamed.

        Blocks that are not measured yet are left out. Reads no device.
        """
        return {
            slot.name: float(self.state[slot.param]["gsnr"]) / divisor(slot.group)
            for slot in self._slots()
            if is_measured(self.state.get(slot.param, {}))
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
        self._advance(self._step_blocks(*self._plan()))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, also of an older version, the released ``sgd-sai`` or ``torch.optim.SGD``.

        Options that it lacks keep the constructor's values. Momentum and gain keep their own dtypes
        whatever the parameters' is; a gain that is 0 or not finite counts as not measured. Of SGD
        the momentum is taken over, as an average, and goes on; its learning rate and coupled decay
        mean something else, and ours stay. Gains are measured at the next step.
        """
        loaded: dict[str, Any] = {}

        # Hooks around torch's own loading, which casts every state tensor to its parameter's dtype.
        def remember(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded.update(saved)
            theirs, ours = saved["param_groups"], self.param_groups
            return {**saved, "param_groups": groups_to_load(theirs, ours, self.defaults)}

        def restore(_: Optimizer) -> None:
            indices = [i for group in loaded["param_groups"] for i in group["params"]]
            for i, slot in zip(indices, self._slots(), strict=True):
                if i in loaded["state"]:
                    restore_block(slot, self.state[slot.param], loaded["state"][i])
            self._going_on = take_over(loaded, self._slots(), self.state)
            for group in self.param_groups:
                group["rounding_step"] = int(group["rounding_step"])  # kept on the device or not
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
        self._shapes, self._going_on = [shapes_of(group) for group in self.param_groups], set()
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _slots(self) -> list[Slot]:
        """The place of every block."""
        slots: list[Slot] = []
        for group in self.param_groups:
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                index = len(slots)
                slots.append(Slot(names[i] if names else index, index, param, group))
        return slots

    @torch._disable_dynamo
    def _plan(self) -> tuple[list[Slot], Plan]:
        """Every block's place, and what they decide together: found once a step."""
        refuse_flat(self.param_groups, self._shapes)
        slots = self._slots()
        # Elements of a temporary: four in float32 are 0.8 % of bfloat16 parameters.
        numel = sum(slot.param.numel() for slot in slots)
        return slots, Plan(
            numel,
            limit=max(2**15, numel // 1000),
            one_pass=one_pass_pays(self.param_groups),
            skips=any(group["skip_nonfinite"] for group in self.param_groups),
            normalizes=any(group["normalize"] for group in self.param_groups),
        )

    def _step_blocks(self, slots: Sequence[Slot], plan: Plan) -> Tensor | None:
        """A step of these blocks, as far as they hold a gradient, and of no others.

        Returns:
            On the device whether it changed anything, where that was in question.
        """
        work, keep = self._prepare(slots, plan, torch.compiler.is_compiling())
        for update, rows, options, limit in work:
            update(rows, options, limit)
        return keep

    @torch._disable_dynamo
    def _advance(self, keep: Tensor | None = None) -> None:
        """Ends a step: the next one draws other bits, unless this one changed nothing."""
        for group in self.param_groups:
            step, taken = group["rounding_step"], 1 if keep is None else keep
            if isinstance(step, Tensor) and keep is not None:
                taken = keep.to(step.device)
            counts = is_a_step(group, self.state)
            group["rounding_step"] += taken * counts  # in place where it is kept on the device
            group["refresh_step"] += counts and group["refresh"] is not None

    @torch._disable_dynamo
    def _prepare(
        self, slots: Sequence[Slot], plan: Plan, compiling: bool
    ) -> tuple[list[tuple[Callable[..., None], list[Row], Options, int | None]], Tensor | None]:
        """Makes state, starts new blocks, and says which function is to update what, and how.

        Not traced: whether a block is measured is a fact of the host. So the gains are numbers of
        the host too: floats, or 0-d tensors where the update is traced, not to be specialised.
        """
        shared = joining(slots, self.state)
        meshes = meshes_of(slots)
        slots = [slot for slot in slots if slot.param.grad is not None]
        if any(slot.param.grad.layout != torch.strided for slot in slots):  # pyright: ignore
            raise RuntimeError("SGDSaI does not support sparse gradients: ask for dense ones")
        blocks = [make_block(slot, self.state[slot.param]) for slot in slots]
        groups: dict[int, list[Block]] = {}
        for block in blocks:
            groups.setdefault(id(block.slot.group), []).append(block)
        paths = {i: path_for(mine, plan.one_pass, compiling) for i, mine in groups.items()}
        draws: dict[int, Draw] = {}
        for i, mine in groups.items():
            draws |= draws_of(mine, paths[i] is update_fused, compiling)
        keep = self._whether_to_keep(blocks, meshes, plan.skips)
        grad_scale = getattr(self, "grad_scale", None)  # set by torch's GradScaler, as found_inf is
        waiting = [b for b in blocks if (b.starts or b.remeasures) and b.grad.numel()]
        of_step = (waiting, shared, self.state, keep, grad_scale, plan)
        starts = self._begin(*of_step) if waiting or shared else {}
        starts = without_those_that_go_on(starts, waiting, self._going_on)
        if plan.normalizes:
            self._settle_largest_gain()
        work = []
        for i, mine in groups.items():
            group = mine[0].slot.group
            options = Options(
                learning_rate(group, compiling),
                group["momentum"],
                group["weight_decay"],
                group["nesterov"],
                group["maximize"],
                keep,
                grad_scale,
                group["direction"] == "sign",
            )
            limit = None if compiling or group["differentiable"] else plan.limit
            goes_on = [b for b in mine if starts.get(b.slot.index) is None]
            begins = [b for b in mine if starts.get(b.slot.index)]
            # A momentum that begins keeps nothing of the zeros that it is made of.
            from_zero = options._replace(momentum=0.0)
            if compiling and begins:  # at once, for the graph to be that of all later steps
                in_place = from_zero._replace(lr=0.0, weight_decay=0.0)
                update_forloop(rows_of(begins, draws, 1.0, compiling=False), in_place)
                goes_on, begins = sorted(goes_on + begins, key=lambda b: b.slot.index), []
            for some, theirs in (goes_on, options), (begins, from_zero):
                if some:
                    rows = rows_of(some, draws, divisor(group), compiling)
                    work.append((paths[i], rows, theirs, limit))
        return work, keep

    def _begin(self, *of_step: Any) -> dict[int, bool]:
        return begin(*of_step)

    def _whether_to_keep(
        self, blocks: Sequence[Block], meshes: Sequence[Any], skips: bool
    ) -> Tensor | None:
        """Whether this step is to change anything, on the device, where that is in question."""
        keep, found_inf = None, getattr(self, "found_inf", None)
        if skips:
            keep = count_skipped([b.grad for b in blocks], self.param_groups[0], meshes)
        if found_inf is not None:
            finite = found_inf.reshape(()) == 0
            keep = finite if keep is None else keep & finite.to(keep.device)
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
