"""What the training loop works with: data, model, optimizer, and what the folder holds of them."""

import contextlib
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nomadam.experiments import checkpoints, processes, resources
from nomadam.experiments.configuration import Run, to_json
from nomadam.experiments.event_files import summary_writer
from nomadam.experiments.first_stage import FirstStage
from nomadam.experiments.joint_batch_norm import join_batch_norms
from nomadam.optimizers.baselines import build_optimizer, find_baseline
from nomadam.optimizers.gradient_release import GradientRelease, release_gradients
from nomadam.runs import FORMAT, RunFolder, RunFolderError

Device = Literal["auto", "cpu", "cuda", "mps"]
STAND_IN = 8  # of a number that only the loaded data know


@dataclasses.dataclass(kw_only=True)
class Parts:
    """What the loop works with.

    Args:
        run: what is trained.
        home: its folder.
        accelerator: accelerate's; knows the device and the other processes.
        dataset: what the Run's data loaded.
        module: the bare module, which is saved and evaluated.
        model: the same as accelerate gave it back, which is trained.
        optimizer: of the module's parameters.
        peak_lrs: learning rate of each group at the schedule's factor 1.
        num_params: number of parameters that train, tied ones once.
        baseline_memory_mb: memory before the module was built.
        release: what steps the optimizer within the backward, None where the loop does.
        first_stage: what the weights come from, None where they are fresh.
        step: the last step that is done.
        seconds: spent in training so far, over all its processes one after another.
    """

    run: Run
    home: RunFolder
    accelerator: Any
    dataset: Any
    module: torch.nn.Module
    model: Any
    optimizer: torch.optim.Optimizer
    peak_lrs: list[float]
    num_params: int
    baseline_memory_mb: float | None
    release: GradientRelease | None
    first_stage: FirstStage | None = None
    step: int = 0
    seconds: float = 0.0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    @property
    def sizes(self) -> dict[str, int]:
        """``num_params``, and ``num_all_params`` where some of the parameters do not train."""
        everything = sum(each.numel() for each in self.module.parameters())
        frozen = {} if everything == self.num_params else {"num_all_params": everything}
        return {"num_params": self.num_params, **frozen}


def check_optimizer(run: Run, *, whole: bool = False) -> None:
    """Refuse an optimizer that can not be built, before anything is loaded or written.

    Where it has arguments, or its gradients are released, it is built on the Run's model, without
    memory for its parameters.

    Args:
        run: the Run.
        whole: build it in any case, so that a missing library is found too.

    Raises:
        ValueError: its name or one of its arguments is unknown, with the nearest names, or out of
            range.
        ImportError: its library, or that of the model, is missing; only where it is built.
    """
    choice = run.optimizer
    try:
        find_baseline(choice.name, choice.arguments)
        built = choice.arguments or run.release_gradients or whole
        module = _weightless(run) if built else None
        if module is not None:
            with contextlib.suppress(RuntimeError):  # it may want a device that is not this one
                _release(run, module, _optimizer(run, module))
    except TypeError as error:
        raise ValueError(f"optimizer.arguments: {error}") from error


def _weightless(run: Run) -> torch.nn.Module | None:
    """The Run's model with the names and shapes of its parameters only, None where it resists."""
    shape = {
        name: getattr(run.data, name, STAND_IN)
        for name in inspect.signature(run.model.build).parameters
        if name != "pretrained"
    }
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return run.model.build(**shape)
    except ImportError:
        raise
    except Exception:
        # The training itself will tell, with the data's own shape.
        return None


def _optimizer(run: Run, module: torch.nn.Module) -> torch.optim.Optimizer:
    choice = run.optimizer
    return build_optimizer(
        choice.name, module, lr=choice.lr, weight_decay=choice.weight_decay, **choice.arguments
    )


def _release(run: Run, module: torch.nn.Module, optimizer: Any) -> GradientRelease | None:
    if not run.release_gradients:
        return None
    try:
        return release_gradients(module, optimizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"release_gradients = True: {error}") from error


def check_runs(
    runs: Sequence[Run],
    *,
    device: Device = "auto",
    cache: str | Path | None = None,
    tensorboard: bool = False,
) -> None:
    """Raise what would keep one of the Runs from being trained: optimizer, device or data.

    Args:
        runs: each is checked; data that several have in common are loaded once.
        device: as ``train`` takes it, like all that follow.
        cache: see there.
        tensorboard: see there.

    Raises:
        ValueError: as `check_optimizer` and `make_accelerator`, and for data that can not be had.
        ImportError: a library is missing.
    """
    if tensorboard:
        summary_writer()
    loaded = []
    for run in runs:
        check_optimizer(run, whole=True)
        make_accelerator(run, device)
        if run.data not in loaded:
            run.data.load(None if cache is None else Path(cache))
            loaded.append(run.data)


def make_accelerator(run: Run, device: Device) -> Any:
    """Make accelerate's Accelerator for a Run.

    Raises:
        ImportError: without accelerate, naming the extra to install.
        ValueError: for a device that is not there, and among several processes for a batch with
            fewer rows than there are of them, for gradients that can not be released there, and
            where the launcher has left them apart.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
    except ImportError as error:
        raise ImportError('training needs accelerate: pip install "nomadam[lab]"') from error
    available = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device, False):
        have = ", ".join(name for name, there in available.items() if there)
        raise ValueError(f"device = {device!r}: must be one that this machine has: {have}")
    # accelerate keeps these for the whole process, and refuses a second training that differs.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    several = processes.count() > 1
    if run.batch_size < processes.count():
        count = processes.count()
        raise ValueError(f"batch_size = {run.batch_size}: must be at least {count}, the processes")
    if several and device == "mps":
        raise ValueError("device = 'mps': must be cpu or cuda where processes train together")
    if run.release_gradients and several:
        raise ValueError("release_gradients = True: must be False where processes train together")
    kind = "cuda" if device in ("auto", "cuda") and available["cuda"] else "cpu"
    processes.join(torch.device(kind))
    mixed = "bf16" if run.precision == "bf16_autocast" else "no"
    cpu = device == "cpu" or (several and kind == "cpu")
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed)
    if accelerator.num_processes != processes.count():
        raise ValueError(
            f"WORLD_SIZE = {processes.count()}: the processes do not find one another; start them "
            "by torchrun or accelerate launch, which set RANK, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT too"
        )
    return accelerator


def prepare(
    run: Run,
    home: RunFolder,
    accelerator: Any,
    cache: str | Path | None,
    again: bool,
    first_stage: FirstStage | None = None,
) -> Parts:
    """Load the data, build model and optimizer, and take up what the folder holds."""
    with accelerator.main_process_first():
        dataset = run.data.load(None if cache is None else Path(cache))
    _check_tokenizer(dataset, first_stage)
    device = accelerator.device
    resources.reset_peak_memory(device)
    baseline_memory_mb = resources.memory_mb(device)
    checkpoints.seed_everything(run.seed)
    pretrained = {} if first_stage is None else {"pretrained": first_stage.folder}
    module = run.model.build(**run.data.shape(dataset), **pretrained)
    module.to(device, torch.bfloat16 if run.precision == "bf16" else None)
    if processes.count() > 1:
        join_batch_norms(module)
    optimizer = _optimizer(run, module)
    parts = Parts(
        run=run,
        home=home,
        accelerator=accelerator,
        dataset=dataset,
        module=module,
        # Without its wrapper for several processes, which sums gradients in an order of its own.
        model=accelerator.prepare_model(module, evaluation_mode=True),
        optimizer=optimizer,
        peak_lrs=[float(group["lr"]) for group in optimizer.param_groups],
        num_params=sum(each.numel() for each in module.parameters() if each.requires_grad),
        baseline_memory_mb=baseline_memory_mb,
        release=_release(run, module, optimizer),
        first_stage=first_stage,
    )
    checkpoints.seed_everything(processes.own_seed(run.seed))
    found = processes.gathered([_open_folder(parts, again) if parts.is_main else None])[0]
    if found is not None:
        _take_up(parts, Path(found))
    processes.begin_alike(module)
    return parts


def check_second_stage(run: Run, stage: Run, *, cache: str | Path | None = None) -> None:
    """Raise what would keep a Run from being trained once its first stage is.

    The data of both are loaded, and model and optimizer are built on fresh weights.

    Args:
        run: the Run.
        stage: its first stage, of which nothing has to be there.
        cache: as ``train`` takes it.

    Raises:
        ValueError: for data that can not be had, another tokenizer than the first stage's, and a
            model or an optimizer that can not be built.
    """
    folder = None if cache is None else Path(cache)
    dataset = run.data.load(folder)
    module = run.model.build(**run.data.shape(dataset))
    _release(run, module, _optimizer(run, module))
    own, theirs = (
        each.description.get("tokenizer_sha256") for each in (dataset, stage.data.load(folder))
    )
    if own is not None and theirs is not None and own != theirs:
        raise ValueError(
            f"the data's tokenizer (SHA-256 {own}) is not that of the data of the first stage, "
            f"{stage.name} ({theirs}); it must be, so that its weights know the tokens"
        )


def _check_tokenizer(dataset: Any, first_stage: FirstStage | None) -> None:
    """Refuse tokens whose numbers mean other text than they did in the first stage."""
    theirs = first_stage.tokenizer_sha256 if first_stage is not None else None
    own = dataset.description.get("tokenizer_sha256")
    if first_stage is not None and theirs is not None and own is not None and own != theirs:
        raise RunFolderError(
            f"the data's tokenizer (SHA-256 {own}) is not that of the first stage in "
            f"{first_stage.folder} ({theirs}); where the text has changed since, delete that "
            "folder to train it again"
        )


def _take_up(parts: Parts, checkpoint: Path) -> None:
    state = checkpoints.read_checkpoint(checkpoint, parts.module, parts.optimizer)
    parts.step, parts.seconds = state["step"], state["seconds"]
    generators = state["random"]
    try:
        if processes.index() < len(generators):
            checkpoints.restore_random_state(generators[processes.index()])
        else:  # there were fewer processes then
            checkpoints.seed_everything(processes.own_seed(parts.run.seed, parts.step))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RunFolderError(
            f"{checkpoint} is damaged: state.json holds no random generators; delete that folder"
        ) from error


def _open_folder(parts: Parts, again: bool) -> str | None:
    """Write what describes the run; return the checkpoint to go on from, if there is one."""
    home, description = parts.home, dict(parts.dataset.description)
    if again:
        home.clear()
    checkpoint = home.newest_checkpoint()
    held = home.read_header()
    if checkpoint is not None and held is not None:
        then, now = held.get("data", {}).get("sha256"), description.get("sha256")
        if then != now:
            raise RunFolderError(
                f"the data of {home.path} have changed since it was begun (SHA-256 {then} then, "
                f"{now} now); begin again in another folder, or here with again=True (--again)"
            )
    stage = parts.first_stage.description if parts.first_stage is not None else None
    if checkpoint is not None and held is not None and held.get("first_stage") != stage:
        raise RunFolderError(
            f"the first stage of {home.path} is another one than when it was begun; begin again in "
            "another folder, or here with again=True (--again)"
        )
    home.keep_metrics(checkpoint[0] if checkpoint else 0)
    home.write_json(
        "run.json",
        {
            "format": FORMAT,
            "run": to_json(parts.run),
            "data": description,
            **parts.sizes,
            "optimizer_summary": _summary(parts.optimizer),
            **({} if stage is None else {"first_stage": stage}),
        },
    )
    surroundings = resources.environment(parts.accelerator.device)
    begun = home.read_object("environment.json") if checkpoint is not None else None
    if checkpoint is not None and begun is not None:
        # Where it began stays; where it went on is added.
        earlier = begun.get("resumed", [])
        if not isinstance(earlier, list):
            path = home.path / "environment.json"
            raise RunFolderError(f"{path} is damaged: 'resumed' is no list; delete the file")
        resumed = {"step": checkpoint[0], **surroundings}
        surroundings = {**begun, "resumed": [*earlier, resumed]}
    home.write_json("environment.json", surroundings)
    return str(checkpoint[1]) if checkpoint else None


def _summary(optimizer: Any) -> str:
    groups = [
        f"{len(group['params'])} tensors with {sum(p.numel() for p in group['params']):,} values, "
        f"lr {float(group['lr']):g}, weight decay {float(group.get('weight_decay', 0)):g}"
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}: " + "; ".join(groups)
