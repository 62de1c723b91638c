"""What a training is made of: the Run; and of Runs and Studies JSON, hash, changes by field."""

import dataclasses
import difflib
import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from nomadam.experiments.fields import (
    Scalar,
    check_types,
    field_types,
    parse,
    require,
    scalar_from_text,
)
from nomadam.experiments.schedule import Schedule
from nomadam.experiments.study import Study

PACKAGE = "nomadam.experiments"
Part = TypeVar("Part")
Made = TypeVar("Made", bound="Run | Study")


@runtime_checkable
class Model(Protocol):
    """A frozen dataclass that describes a model.

    It may also have ``measures(module, batch)``: the mean over a batch of whatever it is evaluated
    by, by name, ``loss`` among them. ``metrics.jsonl`` has them as ``validation_NAME``.

    And it may have ``finish(module, dataset, folder)``, which is called once after the last step,
    in evaluation mode and without gradients, in the main process: it may write files of its own
    into the run folder, and what it returns, numbers by name, stands in ``result.json``. It draws
    from the global generators, which are seeded with the Run's seed before.

    And it may have ``first_stage()``: the Run whose final weights it starts from, or None. That Run
    is trained first where need be, and ``build`` gets its folder as ``pretrained``, which is None
    by default and then stands for fresh weights. With ``check_data(data)`` it may refuse, by a
    ValueError, data that it can not be trained on.
    """

    @property
    def build(self) -> Callable[..., Any]:
        """Makes the module, freshly initialised, from what the data's ``shape`` says."""
        ...

    def loss(self, module: Any, batch: Any) -> Any:
        """The mean loss of a batch, in float32."""
        ...


@runtime_checkable
class Data(Protocol):
    """A frozen dataclass that describes a data set."""

    @property
    def tokens_per_row(self) -> int:
        """What a row of a batch counts: the tokens that are predicted in it, or 1."""
        ...

    def load(self, cache_folder: Any = None) -> Any:
        """Read the data; its ``description`` holds JSON scalars, ``sha256`` among them."""
        ...

    def shape(self, dataset: Any) -> dict[str, int]:
        """What the model's ``build`` needs to know of the data."""
        ...

    def train_batch(
        self, dataset: Any, *, seed: int, step: int, micro: int, batch_size: int
    ) -> Any:
        """The rows of one micro-batch, a pure function of the arguments."""
        ...

    def validation_batches(
        self, dataset: Any, *, batch_size: int, max_batches: int | None
    ) -> Iterator[Any]:
        """The held-out rows, the same ones in the same order each time."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """An optimizer by its name in the table of baselines, and its hyper-parameters.

    Args:
        name: such as ``sgd_sai`` or ``adamw``; checked against the table when it is built.
        lr: learning rate at the schedule's factor 1, at least 0.
        weight_decay: of tensors with two or more dimensions, at least 0; default 0.1.
        arguments: the optimizer's further keyword arguments, JSON scalars; default none.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> OptimizerChoice(name="sgd_sai", lr=1e-2, arguments={"gain": "sqrt_numel"}).weight_decay
        0.1
    """

    name: str
    lr: float
    weight_decay: float = 0.1
    arguments: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "optimizer.")
        require(bool(self.name), "optimizer.name", self.name, "a name")
        require(self.lr >= 0, "optimizer.lr", self.lr, "at least 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training, complete: whoever has it can repeat it.

    Args:
        name: dotted path of the function that made it, below ``nomadam.experiments`` or anywhere.
        model: describes the model (`Model`), such as ``GPT2Model``.
        data: describes the data (`Data`), such as ``TokenData``.
        optimizer: its name and hyper-parameters.
        schedule: the learning rate over the steps; default 10 % warm-up and a cosine to 0.
        steps: optimizer steps, at least 1.
        batch_size: rows of a micro-batch over all processes, at least 1 for each of them.
        accumulation: micro-batches a step, at least 1; default 1.
        clip_norm: largest norm of the whole gradient, above 0, or None; default 1.
        release_gradients: step each tensor as soon as its gradient is there, and free the gradient
            (`nomadam.release_gradients`): the same weights with less memory; for SGDSaI in one
            process, and ``clip_norm`` must be None; default False.
        precision: ``fp32``, ``bf16_autocast`` (float32 parameters) or ``bf16`` (bf16 parameters).
        seed: of initialisation, batches and dropout, 0 to 2^32 − 1; default 0.
        evaluate_every: steps between evaluations, at least 1; the last step is evaluated always.
        evaluation_batches: validation batches an evaluation, at least 1, or None for all of them.
        checkpoint_every: steps between checkpoints, at least 1; the last step has one always.

    Raises:
        ValueError: naming the field, its value and its range.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> run = override(demo(), {"steps": "6"})
        >>> run.steps, run.name
        (6, 'gpt2_pretraining.demo')
    """

    name: str
    model: Model
    data: Data
    optimizer: OptimizerChoice
    schedule: Schedule = Schedule()
    steps: int
    batch_size: int
    accumulation: int = 1
    clip_norm: float | None = 1.0
    release_gradients: bool = False
    precision: Literal["fp32", "bf16_autocast", "bf16"] = "fp32"
    seed: int = 0
    evaluate_every: int = 100
    evaluation_batches: int | None = None
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self)
        require(
            re.fullmatch(r"\w+(\.\w+)*", self.name) is not None, "name", self.name, "a dotted path"
        )
        for part in ("model", "data"):
            described = dataclasses.is_dataclass(getattr(self, part))
            require(described, part, getattr(self, part), "a dataclass")
        counts = ("steps", "batch_size", "accumulation", "evaluate_every", "checkpoint_every")
        for field in counts:
            require(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
        if self.evaluation_batches is not None:
            value = self.evaluation_batches
            require(value >= 1, "evaluation_batches", value, "at least 1, or none for all")
        if self.clip_norm is not None:
            require(self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0, or none")
            allowed = "none where release_gradients is true: no norm of all gradients is known then"
            require(not self.release_gradients, "clip_norm", self.clip_norm, allowed)
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 4294967295")
        if check_data := getattr(self.model, "check_data", None):
            check_data(self.data)


def to_json(run: Run | Study) -> dict[str, Any]:
    """The whole Run or Study as JSON; what can be of several classes bears its class.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> to_json(demo())["model"]["class"]
        'nomadam.experiments.language_model.GPT2Model'
    """
    return _plain(run, bear_class=isinstance(run, Study))


def from_json(values: Mapping[str, Any]) -> Run | Study:
    """Make the Run or Study again from its JSON.

    Classes are looked up in the files of ``nomadam.experiments`` and nowhere else, so that a file
    can not make the program import other code.

    Args:
        values: what `to_json` gave, or the same read from a file.

    Raises:
        ValueError: for a missing or unknown field, a value of the wrong type or out of range, and
            a class from elsewhere.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> from_json(to_json(demo())) == demo()
        True
    """
    if not isinstance(values, Mapping) or "class" not in values:
        return _instance(Run, values, "")
    cls = _own_class(values, "")
    if not issubclass(cls, Study):
        raise ValueError(f"class = {values['class']!r}: must be a Study, or left out for a Run")
    return _instance(cls, values, "")


def short_hash(run: Run | Study) -> str:
    """Eight hexadecimal digits of the SHA-256 of the canonical JSON.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> len(short_hash(demo())), short_hash(demo()) == short_hash(override(demo(), {}))
        (8, True)
    """
    canonical = json.dumps(to_json(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def override(run: Made, changes: Mapping[str, Any]) -> Made:
    """A Run or Study with some fields changed.

    Args:
        run: it stays as it is.
        changes: dotted field to its value, as text (``"3e-4"``, ``"none"``, ``"0.4,0.8"``) or in
            the field's own type. ``optimizer.arguments.gain`` sets one argument.

    Raises:
        ValueError: for an unknown field, with the nearest names, and a value that does not fit.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> override(demo(), {"optimizer.lr": "3e-4", "clip_norm": "none"}).optimizer.lr
        0.0003
        >>> override(demo(), {"lr": "3e-4"})
        Traceback (most recent call last):
        ...
        ValueError: unknown field 'lr'; nearest: optimizer.lr
    """
    known = dict(_leaves(run))
    for field in changes:
        in_arguments = isinstance(known.get(field.rpartition(".")[0]), dict)
        require(field != "name", "name", changes[field], "left: it says what made the Run")
        if field not in known and not in_arguments:
            raise ValueError(f"unknown field {field!r}; nearest: {_nearest(field, known)}")
    return _replaced(run, dict(changes), "")


def differing_fields(
    one: Run | Study | Mapping[str, Any], other: Run | Study | Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The fields in which two Runs or Studies, or their JSON, differ: field to the two values.

    A field that one of them lacks has the value ``"(absent)"`` there.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> differing_fields(demo(), override(demo(), {"seed": 1}))
        {'seed': (0, 1)}
    """
    plain = [each if isinstance(each, Mapping) else to_json(each) for each in (one, other)]
    flat = [dict(_flattened(each)) for each in plain]
    fields = [*flat[0], *(field for field in flat[1] if field not in flat[0])]
    pairs = {field: tuple(each.get(field, "(absent)") for each in flat) for field in fields}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _plain(value: Any, *, bear_class: bool) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return dict(sorted(value.items()))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    cls = type(value)
    plain = {"class": f"{cls.__module__}.{cls.__qualname__}"} if bear_class else {}
    for name, annotation in field_types(cls).items():
        open_kind = annotation in (Model, Data)
        plain[name] = _plain(getattr(value, name), bear_class=open_kind)
    if isinstance(value, Run) and not value.release_gradients:
        del plain["release_gradients"]  # folders and hashes from before it was there stay valid
    return plain


def _instance(cls: type[Part], values: Any, prefix: str) -> Part:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'the run'} = {values!r}: must be a mapping")
    types = field_types(cls)
    given = {name: value for name, value in values.items() if name != "class"}
    for name in given:
        if name not in types:
            raise ValueError(f"unknown field {prefix + name!r}; nearest: {_nearest(name, types)}")
    for name, annotation in types.items():
        if name not in given:
            continue
        if annotation in (Model, Data):
            part = _own_class(given[name], prefix + name)
            given[name] = _instance(part, given[name], f"{prefix}{name}.")
        elif dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            given[name] = _instance(annotation, given[name], f"{prefix}{name}.")
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"{prefix.rstrip('.') or 'the run'} is incomplete: {error}") from error


def _own_class(values: Any, field: str) -> type:
    """The dataclass of this package that a part of the JSON names."""
    name = values.get("class") if isinstance(values, Mapping) else None
    place = f"{field}.class".lstrip(".")
    refusal = ValueError(f"{place} = {name!r}: must be a dataclass of {PACKAGE}")
    if not isinstance(name, str):
        raise refusal
    match = re.fullmatch(rf"({re.escape(PACKAGE)}(?:\.[a-z0-9_]+)+)\.([A-Z]\w*)", name, re.ASCII)
    if match is None:
        raise refusal
    try:
        module = importlib.import_module(match[1])
    except ModuleNotFoundError:
        raise refusal from None
    cls = vars(module).get(match[2])
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise refusal
    if cls.__module__ != module.__name__:
        raise refusal
    return cls


def _leaves(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in field_types(type(part)):
        value = getattr(part, name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nearest(field: str, known: Any) -> str:
    known = list(known)
    last = field.rpartition(".")[2]
    same_end = [name for name in known if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(field, known, n=3, cutoff=0.5)
    return ", ".join(dict.fromkeys(same_end + near)) or ", ".join(known)


def _replaced(part: Any, changes: dict[str, Any], prefix: str) -> Any:
    """The part with its changed fields, all of them at once, so that it is checked once."""
    new: dict[str, Any] = {}
    for name, annotation in field_types(type(part)).items():
        inner = {
            field.removeprefix(f"{name}."): value
            for field, value in changes.items()
            if field.startswith(f"{name}.")
        }
        if name in changes:
            value = changes[name]
            text = isinstance(value, str)
            new[name] = parse(value, annotation, prefix + name) if text else value
        if inner and dataclasses.is_dataclass(getattr(part, name)):
            new[name] = _replaced(getattr(part, name), inner, f"{prefix}{name}.")
        elif inner:
            scalars = {
                key: scalar_from_text(value) if isinstance(value, str) else value
                for key, value in inner.items()
            }
            new[name] = {**new.get(name, getattr(part, name)), **scalars}
    return dataclasses.replace(part, **new)


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
