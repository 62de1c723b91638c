"""Compare optimizers: one Run per arm and seed, each trained in its own process, linked in a file.

A comparison folder holds ``comparison.json``, which names the run folders, and the report. Whatever
has finished stays finished: the same comparison started again goes on where it stopped.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nomadam.experiments import processes
from nomadam.experiments.catalog import find_study, make_runs, takes_optimizer
from nomadam.experiments.child_process import Outcome, run_in_child
from nomadam.experiments.configuration import Run, override, short_hash, to_json
from nomadam.progress import NoProgress
from nomadam.runs import RunFolder

DEFAULT_OPTIMIZERS = ("adamw", "sgdm", "sgd_sai")
REFERENCE = "adamw"
FORMAT = 1
LINKS = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One Run of a comparison: one optimizer or grid point, with one seed.

    Args:
        label: what the arm is called; the same for every seed of it.
        run: what is trained.
        folder: its run folder.
    """

    label: str
    run: Run
    folder: Path

    @property
    def title(self) -> str:
        """The label, and the seed where that is not 0."""
        return f"{self.label} seed {self.run.seed}" if self.run.seed else self.label


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The arms to be compared, and the folder that links them.

    Args:
        name: dotted name of the study.
        arms: the arms of the first seed in their order, then those of the second, and so on.
        folder: the comparison folder.
    """

    name: str
    arms: tuple[Arm, ...]
    folder: Path

    @property
    def labels(self) -> list[str]:
        """The labels, each once, in order."""
        return list(dict.fromkeys(arm.label for arm in self.arms))

    @property
    def reference(self) -> str:
        """The arm that the others are set against: AdamW where it takes part, else the first."""
        names = {arm.label: arm.run.optimizer.name for arm in reversed(self.arms)}
        return next((label for label in self.labels if names[label] == REFERENCE), self.labels[0])


def plan_comparison(
    name: str,
    *,
    optimizers: Sequence[str] = (),
    tuned: Path | None = None,
    num_seeds: int = 1,
    overrides: Mapping[str, str] | None = None,
    out: Path | None = None,
) -> Comparison:
    """Work out the arms of a comparison; nothing is trained or written.

    A study function that takes ``optimizer=`` gives one arm for each optimizer, at its own learning
    rate; one that returns a list of Runs gives one arm for each of them.

    Args:
        name: dotted path of a study function.
        optimizers: names of optimizers; default adamw, sgdm and sgd_sai where the function takes
            an optimizer, else what it returns.
        tuned: folder of a tuning of the study; each optimizer then has its best found values.
        num_seeds: seeds an arm, at least 1: the Run's own seed and those that follow it, without
            the one that was tuned with.
        overrides: fields of every arm's Run to change, as ``override`` takes them.
        out: the comparison folder; the run folders then lie in it. Default
            ``runs/compare-<name>-<hash>``, with the run folders beside it, where ``nomadam run``
            would put them.

    Raises:
        ValueError: an unknown name or field, a value out of its range, fewer than one seed.

    Example:
        >>> plan_comparison("gpt2_pretraining.demo", num_seeds=2).labels
        ['adamw', 'sgdm', 'sgd_sai']
    """
    if num_seeds < 1:
        raise ValueError(f"the number of seeds is {num_seeds}, should be at least 1")
    tuning_seed = None
    if tuned is not None:
        # Imported here, since tuning is built on comparisons.
        from nomadam.experiments.tuning_summary import tuned_runs

        tuning_seed, made = tuned_runs(name, tuned, optimizers=optimizers)
    else:
        if not optimizers and takes_optimizer(find_study(name)):
            optimizers = DEFAULT_OPTIMIZERS
        chosen: Sequence[str | None] = list(dict.fromkeys(optimizers)) or [None]
        made = [run for optimizer in chosen for run in make_runs(name, optimizer=optimizer)]
    changed = [override(run, dict(overrides or {})) for run in made]
    labelled = list(zip(arm_labels(changed), changed, strict=True))
    seeded = [
        (label, replace(run, seed=seed))
        for index in range(num_seeds)
        for label, run in labelled
        for seed in [_seed(run.seed, index, tuning_seed)]
    ]
    distinct = {short_hash(run): (label, run) for label, run in reversed(seeded)}
    digest = hashlib.sha256(json.dumps([name, *distinct]).encode()).hexdigest()[:8]
    folder = Path("runs", f"compare-{name}-{digest}") if out is None else out
    beside = folder.parent if out is None else folder
    arms = tuple(
        Arm(label=label, run=run, folder=beside / f"{run.name}-{run_hash}")
        for run_hash, (label, run) in reversed(distinct.items())
    )
    return Comparison(name=name, arms=arms, folder=folder)


def _seed(first: int, index: int, left_out: int | None) -> int:
    """The seed of this index, counted from the first, without one of them."""
    if left_out is not None and first <= left_out <= first + index:
        return first + index + 1
    return first + index


def arm_labels(made: Sequence[Run]) -> list[str]:
    """Name each Run by its optimizer and by the fields in which it differs from the others.

    Example:
        >>> run = make_runs("gpt2_pretraining.demo", optimizer="adamw")[0]
        >>> other = override(run, {"optimizer.lr": "0.5"})
        >>> arm_labels([run]), arm_labels([run, other])[1]
        (['adamw'], 'adamw lr=0.5')
    """
    flat = [dict(_flatten(to_json(run))) for run in made]
    # The precision first: it says more than any argument that goes with it.
    paths = sorted({path: None for fields in flat for path in fields}, key="precision".__ne__)
    labels = [run.optimizer.name for run in made]
    for path in paths:
        # A field that the labels so far tell already (the learning rate of each arm) adds nothing.
        values: dict[str, set[str]] = {}
        for label, fields in zip(labels, flat, strict=True):
            values.setdefault(label, set()).add(json.dumps(fields.get(path)))
        tells = any(len(distinct) > 1 for distinct in values.values())
        if tells and path not in ("optimizer.name", "seed"):
            short = path.rpartition(".")[2]
            labels = [
                # An argument that is not given has its default, which needs no words.
                f"{label} {short}={_short(fields[path])}" if path in fields else label
                for label, fields in zip(labels, flat, strict=True)
            ]
    return labels


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class ArmOutcome:
    """What became of an arm.

    Args:
        status: ``finished``, ``diverged`` or ``failed``.
        result: its ``result.json``, None where it failed.
        trained: False where it had ended in an earlier call.
        error: why it failed, in one message.
        traceback: the traceback of the failure.
        bad_input: whether what it was given is to blame (a ``ValueError``).
    """

    status: str
    result: dict[str, Any] | None = None
    trained: bool = True
    error: str | None = None
    traceback: str = ""
    bad_input: bool = False


def train_arm(
    arm: Arm,
    options: Mapping[str, Any],
    make_progress: Callable[[str, int], Any],
) -> dict[str, Any]:
    """Train one arm in this process; what a comparison calls in a child process.

    Args:
        arm: the arm.
        options: keyword arguments of ``train``: device, cache, again, tensorboard.
        make_progress: makes a context manager from label and steps, called with each record.
    """
    show = make_progress if processes.is_first() else NoProgress
    with show(arm.title, arm.run.steps) as progress:
        # Imported after the bar is there: torch and transformers take seconds to load.
        from nomadam.experiments.training import train

        result = train(arm.run, arm.folder, progress=progress, **options)
    processes.leave()
    return result


def run_arms(
    comparison: Comparison,
    *,
    options: Mapping[str, Any],
    make_progress: Callable[[str, int], Any],
    tell: Callable[[Arm, ArmOutcome], None],
    train: Callable[..., dict[str, Any]] = train_arm,
    call: Callable[..., Outcome] = run_in_child,
    again: bool = False,
) -> list[ArmOutcome]:
    """Train the arms one after another, each in a fresh process, and link them in the folder.

    An arm that has ended before is not trained again. One that diverges or fails is recorded, and
    the next one starts.

    Args:
        comparison: from ``plan_comparison``; its folder is made, ``comparison.json`` in it written.
        options: keyword arguments of ``train`` of the training loop.
        make_progress: makes a progress line from label and steps; a picklable callable.
        tell: called with each arm and what became of it.
        train: what the child process calls; default ``train_arm``.
        call: calls it there; default `run_in_child`.
        again: train every arm from the start. What they left is removed after the optimizers,
            the device and the data have been found to be there.

    Returns:
        One outcome an arm, in their order.

    Raises:
        ValueError: the folder holds a run, or a comparison of other arms; an arm's optimizer can
            not be built; another process compares in the folder.
        RuntimeError: with ``again``, an arm can not be trained for another reason.
        KeyboardInterrupt: interrupted; the arm in training has written its checkpoint.
    """
    _check_folder(comparison)
    _check_arms(comparison, options, call, again)
    with RunFolder(comparison.folder).locked("comparing"):
        # Another process may have put something there since.
        _check_folder(comparison)
        if again:
            forget_results(comparison)
        train_one = functools.partial(call, train)
        return _run_arms(comparison, options, make_progress, tell, train_one)


def _check_arms(
    comparison: Comparison, options: Mapping[str, Any], call: Callable[..., Outcome], again: bool
) -> None:
    """Refuse arms that can not be trained, before anything is written or removed."""
    # Imported here, since it loads torch.
    from nomadam.experiments.preparation import check_optimizer

    for arm in comparison.arms:
        if again or ended_result(arm) is None:
            try:
                check_optimizer(arm.run)
            except ValueError as error:
                raise ValueError(f"{arm.title}: {error}") from error
    if again:
        outcome = call(check_arms, comparison.arms, dict(options))
        if outcome.error is not None:
            kind = ValueError if outcome.bad_input else RuntimeError
            raise kind(f"{outcome.error}; what was there before is kept")


def check_arms(arms: Sequence[Arm], options: Mapping[str, Any]) -> None:
    """Raise what would keep one of the arms from being trained; called in a child process."""
    from nomadam.experiments.preparation import check_runs

    check_runs([arm.run for arm in arms], **options)


def _run_arms(
    comparison: Comparison,
    options: Mapping[str, Any],
    make_progress: Callable[[str, int], Any],
    tell: Callable[[Arm, ArmOutcome], None],
    train_one: Callable[..., Outcome],
) -> list[ArmOutcome]:
    outcomes: list[ArmOutcome] = []
    write_links(comparison, outcomes)
    for arm in comparison.arms:
        result = ended_result(arm)
        if result is not None:
            outcome = ArmOutcome(status=result["status"], result=result, trained=False)
        else:
            outcome = _outcome(train_one(arm, dict(options), make_progress))
        outcomes.append(outcome)
        write_links(comparison, outcomes)
        tell(arm, outcome)
    return outcomes


def _outcome(child: Outcome) -> ArmOutcome:
    if child.error is None:
        return ArmOutcome(status=child.value["status"], result=child.value)
    return ArmOutcome(
        status="failed", error=child.error, traceback=child.traceback, bad_input=child.bad_input
    )


def ended_result(arm: Arm) -> dict[str, Any] | None:
    """Return the result of an arm that has finished or diverged before, else None."""
    folder = RunFolder(arm.folder)
    try:
        header, result = folder.read_header(), folder.read_result()
    except ValueError:
        return None
    return result if header is not None and header["run"] == to_json(arm.run) else None


def forget_results(comparison: Comparison) -> None:
    """Remove what earlier trainings of the arms have left, so that each is trained from the start.

    Raises:
        ValueError: a process is training in one of the folders.
    """
    for arm in comparison.arms:
        if (arm.folder / "run.json").exists():
            folder = RunFolder(arm.folder)
            with folder.locked():
                folder.clear()


def write_links(comparison: Comparison, outcomes: Sequence[ArmOutcome]) -> None:
    """Write ``comparison.json``: the arms, their run folders, and what became of those that ended.

    The paths of the run folders are relative to the comparison folder, so that both can be moved.
    """
    arms = []
    for index, arm in enumerate(comparison.arms):
        entry = {
            "label": arm.label,
            "optimizer": arm.run.optimizer.name,
            "seed": arm.run.seed,
            "folder": Path(os.path.relpath(arm.folder, comparison.folder)).as_posix(),
        }
        if index < len(outcomes):
            entry["status"] = outcomes[index].status
            if outcomes[index].error is not None:
                entry["error"] = outcomes[index].error
        arms.append(entry)
    values = {
        "format": FORMAT,
        "name": comparison.name,
        "reference": comparison.reference,
        "arms": arms,
    }
    RunFolder(comparison.folder).write_json(LINKS, values)


def _check_folder(comparison: Comparison) -> None:
    """Refuse a folder that holds a run, or whose comparison would lose arms."""
    folder = comparison.folder
    if (folder / "run.json").exists():
        raise ValueError(f"{folder} holds a run, so a comparison can not be put there")
    held = RunFolder(folder).read_object(LINKS) or {}
    arms = held.get("arms", [])
    whole = isinstance(arms, list) and all(
        isinstance(arm, dict) and isinstance(arm.get("folder"), str) for arm in arms
    )
    if not whole:
        raise ValueError(f"{folder / LINKS} is damaged: 'arms' is no list of run folders")
    linked = {arm["folder"] for arm in arms}
    planned = {Path(os.path.relpath(arm.folder, folder)).as_posix() for arm in comparison.arms}
    if lost := sorted(linked - planned):
        raise ValueError(
            f"{folder} holds another comparison, with {', '.join(lost)}; choose another --out"
        )
