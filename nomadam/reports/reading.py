"""Read run folders and comparison folders into plain records; nothing that is read can run code."""

import json
import math
import os
import shlex
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nomadam.reports.png_files import read_png

LARGEST, SMALLEST_GAIN = 1e30, 1e-30
SAMPLES = "samples.png"
EXPECTED = "a run folder holds run.json, a comparison folder holds comparison.json"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one run folder says, with everything that is missing left empty.

    Args:
        folder: where it was read.
        hint: the label that a comparison gives the run; empty for a run that stands alone.
        status: `finished`, `diverged` or `unfinished`.
        configuration: the `Run`, flattened to dotted fields (`optimizer.lr`), in its own order.
        metrics: one dictionary a step, steps ascending, each step once.
        gains: block name -> (gain, number of elements), in the file's order.
        has_samples: whether there is a picture of samples, and a whole one.
        notes: what could not be read, in words.
    """

    folder: Path
    hint: str = ""
    status: str = "unfinished"
    num_params: float | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    optimizer_summary: str = ""
    metrics: tuple[dict[str, Any], ...] = ()
    gains: dict[str, tuple[float, float]] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    has_samples: bool = False
    notes: tuple[str, ...] = ()

    @property
    def optimizer(self) -> str:
        """The optimizer's name, `unknown` where run.json does not give one."""
        return str(self.configuration.get("optimizer.name") or "unknown")

    @property
    def lr(self) -> float | None:
        """The learning rate, or None."""
        return number(self.configuration.get("optimizer.lr"))

    @property
    def seed(self) -> Any:
        """The seed, or None."""
        return self.configuration.get("seed")

    @property
    def last_step(self) -> int:
        """The last step that metrics.jsonl holds; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0


def number(value: Any) -> float | None:
    """Return `value` as a float of at most ±1e30, None for anything else (text, NaN, a boolean).

    Beyond that lies no measurement, and means and figures overflow.

    Example:
        >>> number(3), number("3"), number(float("nan"))
        (3.0, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if abs(converted) <= LARGEST else None


def plain_text(text: str) -> str:
    """Return `text` on one line, without control, direction-changing or unencodable characters.

    Example:
        >>> plain_text("  adam    w ")
        'adam w'
    """
    joined = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in joined)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, dict):
        return {plain_text(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _parse(text: str) -> Any:
    # Python writes NaN and Infinity, which are no JSON: both are read as null, like 1e999.
    return _clean(json.loads(text, parse_constant=lambda _: None, parse_float=_finite))


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        parsed = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can not be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(parsed).__name__}")
    return parsed


def _read_optional(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return _read_object(path)
    except ValueError as error:
        notes.append(f"Left out: {error}")
        return {}


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted fields; a list becomes its JSON text.

    Example:
        >>> flatten({"optimizer": {"name": "adamw", "lr": 0.001}, "steps": 300})
        {'optimizer.name': 'adamw', 'optimizer.lr': 0.001, 'steps': 300}
    """
    fields: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            fields.update(flatten(item, f"{prefix}{key}."))
        else:
            fields[f"{prefix}{key}"] = json.dumps(item) if isinstance(item, list) else item
    return fields


def _read_metrics(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        notes.append(f"Left out: {path} can not be read: {error.strerror or error}")
        lines = []
    by_step: dict[int, dict[str, Any]] = {}
    damaged = extreme = 0
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = _parse(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(row, dict) and type(step) is int and step > 0:
            by_step[step] = row
            extreme += any(map(_is_extreme, row.values()))
        # A line without its end is one that a killed process was writing: that is no damage.
        elif index < len(lines) - 1:
            damaged += 1
    if damaged:
        notes.append(f"Left out: {damaged} lines of {path} that could not be read")
    if extreme:
        notes.append(f"Left out: numbers beyond {LARGEST:g} in {extreme} lines of {path}")
    return tuple(by_step[step] for step in sorted(by_step))


def _is_extreme(value: Any) -> bool:
    return type(value) in (int, float) and number(value) is None


def _read_gains(path: Path, notes: list[str]) -> dict[str, tuple[float, float]]:
    blocks = _read_optional(path, notes).get("blocks")
    gains: dict[str, tuple[float, float]] = {}
    for name, block in (blocks if isinstance(blocks, dict) else {}).items():
        entry = block if isinstance(block, dict) else {}
        gain, numel = number(entry.get("gain")), number(entry.get("numel"))
        if gain is not None and numel is not None and gain >= SMALLEST_GAIN and numel >= 1:
            gains[name] = (gain, numel)
        else:
            notes.append(f"Left out: the gain of {name} in {path}, which is no gain of a block")
    return gains


def _has_samples(path: Path, notes: list[str]) -> bool:
    if not path.exists():
        return False
    try:
        read_png(path)
    except (OSError, ValueError) as error:
        notes.append(f"Left out: {error}")
        return False
    return True


def _environment(path: Path, notes: list[str]) -> dict[str, Any]:
    environment = _read_optional(path, notes)
    command = environment.get("command")
    if isinstance(command, list):
        environment["command"] = shlex.join(map(str, command))
    return flatten(environment)


def read_run(folder: Path, hint: str = "") -> RunRecord:
    """Read one run folder.

    Only run.json has to be there and whole. A torn last line of metrics.jsonl is passed over;
    other files that are missing or damaged leave their part of the record empty.

    Raises:
        ValueError: the folder holds no readable run.json.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: {EXPECTED}")
    header = _read_object(path)
    configuration = header.get("run")
    if not isinstance(configuration, dict):
        raise ValueError(f"{path} has no field 'run' with the configuration: {EXPECTED}")
    notes: list[str] = []
    result = _read_optional(folder / "result.json", notes)
    status = result.get("status")
    data = header.get("data")
    return RunRecord(
        folder=folder,
        hint=plain_text(hint),
        status=status if status in ("finished", "diverged") else "unfinished",
        num_params=number(result.get("num_params")) or number(header.get("num_params")),
        configuration=flatten(configuration),
        data=flatten(data) if isinstance(data, dict) else {},
        environment=_environment(folder / "environment.json", notes),
        optimizer_summary=str(header.get("optimizer_summary") or ""),
        metrics=_read_metrics(folder / "metrics.jsonl", notes),
        gains=_read_gains(folder / "gains.json", notes),
        result=result,
        has_samples=_has_samples(folder / SAMPLES, notes),
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Every run below the folders that were asked for, and what the comparisons say of them."""

    runs: tuple[RunRecord, ...]
    names: tuple[str, ...]
    references: tuple[str, ...]
    notes: tuple[str, ...]


def _comparison_members(folder: Path) -> tuple[dict[str, Any], list[tuple[Path, str]]]:
    header = _read_object(folder / "comparison.json")
    arms = header.get("arms")
    if not isinstance(arms, list):
        raise ValueError(f"{folder / 'comparison.json'} has no list 'arms'")
    members = []
    for arm in arms:
        entry = arm if isinstance(arm, dict) else {}
        target = entry.get("folder")
        if not isinstance(target, str) or not target:
            raise ValueError(f"{folder / 'comparison.json'}: an arm names no 'folder': {arm!r}")
        hint = entry.get("label") or entry.get("optimizer") or ""
        members.append((folder / target, str(hint)))
    return header, members


def _not_a_folder_of_ours(folder: Path) -> ValueError:
    if not folder.exists():
        return ValueError(f"{folder} does not exist: {EXPECTED}")
    inside = []
    if folder.is_dir():
        inside = sorted(p.parent.name for p in folder.glob("*/run.json"))[:3]
        inside += sorted(p.parent.name for p in folder.glob("*/comparison.json"))[:3]
    advice = f"; did you mean one of those in it ({', '.join(inside)})?" if inside else ""
    return ValueError(f"{folder} is neither a run nor a comparison folder: {EXPECTED}{advice}")


def read_folders(folders: list[Path]) -> Reading:
    """Read run folders and comparison folders, each run once however often it is named.

    An arm of a comparison whose run folder is not there yet is noted and left out.

    Raises:
        ValueError: no folder at all, a folder that is neither, or a comparison without any run.
    """
    if not folders:
        raise ValueError(f"no folder to report on: {EXPECTED}")
    runs: dict[Path, RunRecord] = {}
    names, references, notes = [], [], []
    for folder in map(Path, folders):
        if (folder / "comparison.json").is_file():
            header, members = _comparison_members(folder)
            names.append(str(header.get("name") or folder.name))
            references.append(str(header.get("reference") or ""))
        elif (folder / "run.json").is_file():
            members = [(folder, "")]
        else:
            raise _not_a_folder_of_ours(folder)
        for path, hint in members:
            if path.resolve() in runs:
                continue
            if hint and not (path / "run.json").is_file():
                missing = os.path.normpath(path)
                notes.append(f"Left out: {hint}, for there is no run in {missing} yet")
                continue
            runs[path.resolve()] = read_run(path, hint)
    if not runs:
        raise ValueError(f"{folders[0]} names no run that exists: {'; '.join(notes)}")
    for record in runs.values():
        notes.extend(record.notes)
    return Reading(
        runs=tuple(runs.values()),
        names=tuple(dict.fromkeys(names)),
        references=tuple(dict.fromkeys(filter(None, references))),
        notes=tuple(plain_text(note) for note in notes),
    )
