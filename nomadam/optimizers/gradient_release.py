"""Gradient release: each block is stepped as soon as its gradient is there, which is then freed."""

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward

from nomadam.optimizers.sgd_sai import SGDSaI
from nomadam.optimizers.sgd_sai_blocks import Slot

REFUSED_OPTIONS = {
    "normalize": "which divides by the largest of all gains; leave it False",
    "skip_nonfinite": "which looks at all gradients before any step; leave it False",
    "differentiable": "which needs the step outside of the backward; leave it False",
}

# Methods of the optimizer that do nothing while its gradients are released: so `step` evaluates its
# closure and runs its hooks, and no more. Copies and pickles of the optimizer are not concerned.
SILENCED = {"_step_blocks", "_advance", "zero_grad"}

# They exchange gradients between processes, in hooks of their own or after the backward.
EXCHANGING = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


def release_gradients(model: nn.Module, optimizer: SGDSaI) -> "GradientRelease":
    r"""Makes every backward take the optimizer's step, each gradient freed as soon as it is used.

    ```text
    for each block, the moment its gradient g is complete:
        p, m <- one step of the optimizer with g        as `SGDSaI.step` takes it, bit for bit
        p.grad <- None
    ```

    So the largest gradient is the most that is held at a time, in place of all of them. Every
    backward outside of `GradientRelease.accumulate` is one step. ``optimizer.step()`` and
    ``optimizer.zero_grad()`` may still be called: they change nothing, but ``step`` evaluates its
    closure and runs its hooks. Schedulers, state dicts, groups that are added later, parameters
    that are frozen or thawed later and a resume work as ever. After
    `GradientRelease.remove` everything is as it was before.

    What needs all gradients at a time can not be had, and these can not be seen and refused:

    - ``clip_grad_norm_`` after the backward finds no gradient: it returns 0 and clips nothing. Clip
      each gradient by ``param.register_hook`` instead, or train without.
    - a loss multiplied by a ``GradScaler`` is stepped with its factor in it (``scaler.step``
      raises an error, afterwards). Use bfloat16.
    - a hook or a log after the backward finds no gradient either. A post-accumulate hook that was
      registered before the release does.
    - the module inside a wrapper that exchanges gradients between processes, given without the
      wrapper, is stepped before they are exchanged.
    - a backward that fails half-way leaves the blocks stepped whose gradient had come by then.

    Args:
        model: the module that the optimizer trains, or a ``torch.nn.ModuleList`` of several.
            Parameters that the optimizer does not have keep their gradients.
        optimizer: an `SGDSaI` with any options but ``normalize``, ``skip_nonfinite`` and
            ``differentiable``. Its step is taken by hooks on its parameters from now on.

    Returns:
        The handle, which also is a context manager that removes itself at its end.

    Raises:
        TypeError: for a model that is no module, and an optimizer that is not `SGDSaI`.
        ValueError: for the options above, a parameter that the model lacks, an optimizer that is
            released already or one that exchanges gains among its blocks (`ShuffledSGDSaI`),
            modules that exchange gradients between processes
            (``DistributedDataParallel``, ``FullyShardedDataParallel``), sharded parameters
            (``DTensor``) and embeddings with sparse gradients. The backward raises it for an option
            that was changed since.
        RuntimeError: from the backward: for sparse gradients, ``create_graph=True``, compiled
            autograd, and a backward within a backward, as reentrant checkpointing runs them: there
            a shared parameter would be stepped twice. Use ``use_reentrant=False``.

    Source: Lv et al., *Full Parameter Fine-tuning for Large Language Models with Limited
    Resources*, arXiv 2306.09782, section 3, where it is done for SGD without momentum.

    Examples:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = SGDSaI(model.parameters(), lr=1e-2)
        >>> release = release_gradients(model, optimizer)
        >>> with release.accumulate():
        ...     model(torch.eye(4)[:2]).square().sum().backward()
        >>> before = model.bias.item()
        >>> model(torch.eye(4)[2:]).square().sum().backward()
        >>> model.bias.item() == before, model.bias.grad
        (False, None)
        >>> release.remove()
    """
    return GradientRelease(model, optimizer)


class GradientRelease:
    """What `release_gradients` returns: the handle of an optimizer whose step the backward takes.

    As a context manager it removes itself at the end.
    """

    def __init__(self, model: nn.Module, optimizer: SGDSaI) -> None:
        """Checks what it is given, as `release_gradients` says, and hooks in."""
        _check(model, optimizer)
        self._optimizer = optimizer
        self._handles: list[Any] = []
        self._lock = threading.Lock()  # a backward has a thread for each device
        self._accumulating = 0
        self._backward = -1  # the one that was begun last
        self._slots: dict[int, Slot] = {}
        self._plan: Any = None
        for group in optimizer.param_groups:
            self._watch(group["params"])
        self._handles.append(optimizer.register_step_pre_hook(_refuse_scaled))
        vars(optimizer).update(dict.fromkeys(SILENCED, _nothing))
        vars(optimizer)["add_param_group"] = self._add_param_group

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it, a backward adds to the gradients and takes no step.

        The next backward outside takes one step along the sums, also of the parameters to which it
        adds nothing itself. To throw sums away call ``model.zero_grad()``.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> with release_gradients(model, SGDSaI(model.parameters())) as release:
            ...     with release.accumulate():
            ...         model(torch.ones(3, 2)).sum().backward()
            ...     model.bias.grad
            tensor([3.])
        """
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def remove(self) -> None:
        """Ends it: gradients are kept and ``optimizer.step`` takes the step again.

        Gradients that were accumulated stay for that step. A second call changes nothing.
        """
        for handle in self._handles:
            handle.remove()
        if self._handles:
            for name in (*SILENCED, "add_param_group"):
                del vars(self._optimizer)[name]
        self._handles.clear()

    def __enter__(self) -> "GradientRelease":
        """Returns the handle itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes it."""
        self.remove()

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        """The optimizer's own, and hooks."""
        type(self._optimizer).add_param_group(self._optimizer, param_group)
        self._watch(self._optimizer.param_groups[-1]["params"])

    def _watch(self, params: Iterable[Tensor]) -> None:
        """Hooks in at parameters of the optimizer."""
        # The hooks of a tensor are beyond the garbage collector: they must not hold the model.
        hook = functools.partial(_on_gradient, weakref.ref(self), self._handles)
        for param in params:
            frozen = not param.requires_grad
            param.requires_grad_(True)  # without it a hook is refused, and it may be thawed later
            self._handles.append(param.register_post_accumulate_grad_hook(hook))
            param.requires_grad_(not frozen)

    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        """The gradient of this parameter is complete: step it, and free the gradient."""
        if self._accumulating:
            return
        with self._lock:
            self._begin()
            if param.grad is None:
                raise RuntimeError("a gradient was freed before its release: remove other hooks")
            if param.grad.requires_grad:
                raise RuntimeError(
                    "a gradient that is to be differentiated (create_graph=True) can not be "
                    "released: call torch.autograd.grad, or go on within release.accumulate()"
                )
            self._step([self._slots[id(param)]])

    def _begin(self) -> None:
        """At the first gradient of a backward: find every block once, and ask for its end."""
        backward = torch._C._current_graph_task_id()
        if backward == self._backward:
            return
        _check_options(self._optimizer)
        # It forgets what is to be done at the end. What was never imported is not switched on.
        compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
        if getattr(compiled_autograd, "in_compiled_autograd_region", False):
            raise RuntimeError("gradients can not be released by compiled autograd: switch it off")
        if _is_nested(sys._getframe()):
            raise RuntimeError(
                "gradients can not be released in a backward within a backward, where a shared "
                "parameter would be stepped twice: checkpoint with use_reentrant=False"
            )
        slots, self._plan = self._optimizer._plan()
        self._slots = {id(slot.param): slot for slot in slots}
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._backward = backward

    @torch.no_grad()
    def _end(self) -> None:
        """At the end of a backward: step what holds an accumulated gradient still."""
        self._step([slot for slot in self._slots.values() if slot.param.grad is not None])
        type(self._optimizer)._advance(self._optimizer)
        vars(self._optimizer)["_opt_called"] = True  # schedulers ask whether a step preceded theirs
        self._slots, self._plan = {}, None

    def _step(self, slots: list[Slot]) -> None:
        type(self._optimizer)._step_blocks(self._optimizer, slots, self._plan)
        for slot in slots:
            slot.param.grad = None


def _nothing(*_: object, **__: object) -> None:
    """In place of what only the hooks are to do now."""


@torch._disable_dynamo
def _on_gradient(
    reference: "weakref.ref[GradientRelease]", handles: list[Any], param: Tensor
) -> None:
    release = reference()
    if release is None:
        for handle in handles:
            handle.remove()
        raise RuntimeError(
            "the optimizer of a gradient release was dropped without release.remove(): nothing "
            "would be trained; its hooks are removed now"
        )
    release._take(param)


def _refuse_scaled(optimizer: Any, *_: object) -> None:
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "the gradients were released with the factor of a GradScaler in them, and the blocks "
            "stepped so: train with bfloat16 and no scaler, or without the release"
        )


def _is_nested(frame: FrameType | None) -> bool:
    """Whether a backward runs within another one's, as far as this thread's calls tell."""
    in_backward = False
    while frame is not None:
        begins = frame.f_code is _engine_run_backward.__code__
        if in_backward and (begins or frame.f_code is BackwardCFunction.apply.__code__):
            return True
        in_backward |= begins
        frame = frame.f_back
    return False


def _check_options(optimizer: SGDSaI) -> None:
    for option, why in REFUSED_OPTIONS.items():
        if any(group[option] for group in optimizer.param_groups):
            raise ValueError(f"gradients can not be released with {option}=True, {why}")


def _check(model: nn.Module, optimizer: SGDSaI) -> None:
    """Refuses what can be seen to go wrong."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, SGDSaI):
        raise TypeError(
            f"optimizer must be an SGDSaI itself, not wrapped, got {type(optimizer).__name__}"
        )
    if not optimizer.steps_alone:
        raise ValueError(
            f"gradients can not be released with {type(optimizer).__name__}, which looks at all "
            "blocks together: train without the release"
        )
    if SILENCED <= vars(optimizer).keys():
        raise ValueError("this optimizer's gradients are released already: remove() that first")
    _check_options(optimizer)
    for name, module in model.named_modules():
        where = f"{type(module).__name__}{f' at {name!r}' if name else ''}"
        if _classes(module) & EXCHANGING:
            raise ValueError(
                f"{where} exchanges gradients between processes, so they can not be released: "
                "train in one process, or without the release"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{where} has sparse gradients: make it with sparse=False")
    own = {id(param) for param in model.parameters()}
    slots = optimizer._slots()
    foreign = [slot.name for slot in slots if id(slot.param) not in own]
    if foreign:
        raise ValueError(
            f"the model lacks parameters of the optimizer: {', '.join(map(str, foreign[:8]))}"
            f"{' ...' if len(foreign) > 8 else ''}; pass a torch.nn.ModuleList of all it trains"
        )
    for slot in slots:
        if "DTensor" in _classes(slot.param):
            raise ValueError(
                f"parameter {slot.name} is a DTensor: the gradients of sharded parameters can not "
                "be released; train without the release"
            )


def _classes(thing: object) -> set[str]:
    """Names of what a thing is an instance of: nothing is imported to ask for it."""
    return {cls.__name__ for cls in type(thing).__mro__}
