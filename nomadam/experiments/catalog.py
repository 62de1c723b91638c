"""Which runs there are, and the function behind a run's dotted name."""

import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomadam.experiments.configuration import Run, from_json, short_hash
from nomadam.runs import RunFolder

PACKAGE = "nomadam.experiments"
RETURNS_RUNS = ("Run", "list[Run]")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A function that returns a Run or a list of Runs.

    Args:
        name: dotted path below ``nomadam.experiments``, such as ``gpt2_pretraining.demo``.
        summary: first line of its docstring, or the empty text.
        grid: whether it returns a list of Runs.
    """

    name: str
    summary: str
    grid: bool


def catalog(folder: Path | None = None) -> list[Entry]:
    """List the runs that a folder of study files exports, sorted by name.

    The syntax trees are read and nothing is imported, so listing costs milliseconds and a file
    whose optional libraries are missing is listed too. A run is a public function at the top
    level of a public file, annotated to return ``Run`` or ``list[Run]``.

    Args:
        folder: a folder of Python files; default the files of ``nomadam.experiments``.

    Example:
        >>> "gpt2_pretraining.demo" in [entry.name for entry in catalog()]
        True
    """
    folder = Path(__file__).parent if folder is None else folder
    entries = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            entries += _entries_of(path, ".".join(parts))
    return sorted(entries, key=lambda entry: entry.name)


def _entries_of(path: Path, module: str) -> Iterator[Entry]:
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns:
            returns = ast.unparse(node.returns).strip("'\"").replace("configuration.", "")
            if returns in RETURNS_RUNS and not _required_arguments(node):
                lines = (ast.get_docstring(node) or "").strip().splitlines()
                yield Entry(
                    name=f"{module}.{node.name}",
                    summary=lines[0] if lines else "",
                    grid=returns == "list[Run]",
                )


def _required_arguments(node: ast.FunctionDef) -> bool:
    arguments = node.args
    positional = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return positional > 0 or any(default is None for default in arguments.kw_defaults)


def find_study(name: str) -> Callable[..., Any]:
    """Return the function behind a dotted name.

    The name is looked up below ``nomadam.experiments`` first, then as any importable dotted path,
    with the current directory importable.

    Raises:
        ValueError: there is no such function, answered with the nearest names; or its module
            can not be imported, answered with the reason.

    Example:
        >>> find_study("gpt2_pretraining.demo").__name__
        'demo'
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is not a dotted name such as 'gpt2_pretraining.demo'")
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise ValueError(f"{name!r} names no run{_nearest(name)}")
    module = _import(f"{PACKAGE}.{module_name}")
    if module is None:
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        module = _import(module_name)
    function = getattr(module, function_name, None)
    if function is None:
        raise ValueError(f"there is no run named {name!r}{_nearest(name)}")
    if not callable(function):
        raise ValueError(f"{name!r} names a value of type {type(function).__name__}, no function")
    return function


def _import(name: str) -> Any:
    """Import a module; None when the module itself does not exist."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only an absent module is "not found": what it imports in turn must not be hidden.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise ValueError(f"{name} can not be imported: {error}") from error
    except Exception as error:
        raise ValueError(f"{name} can not be imported: {type(error).__name__}: {error}") from error


def _nearest(name: str) -> str:
    names = [entry.name for entry in catalog()]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = near or [known for known in names if name in known.split(".")]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return "; `nomadam list` shows the names"


def takes_optimizer(function: Callable[..., Any]) -> bool:
    """Say whether a study function has an argument named ``optimizer``.

    Example:
        >>> takes_optimizer(lambda optimizer="adamw": None)
        True
    """
    return "optimizer" in inspect.signature(function).parameters


def make_runs(name: str, *, optimizer: str | None = None) -> list[Run]:
    """Call the function behind a name and return its Runs; a single Run as a list of one.

    Args:
        name: dotted path of a function that returns a Run or a list of Runs.
        optimizer: passed on as ``optimizer=``; default: the function's own choice.

    Raises:
        ValueError: an unknown name; a function that takes no ``optimizer`` where one is asked
            for, that needs further arguments, or that returns something else.

    Example:
        >>> make_runs("gpt2_pretraining.demo", optimizer="sgdm")[0].optimizer.name
        'sgdm'
    """
    function = find_study(name)
    if optimizer is not None and not takes_optimizer(function):
        raise ValueError(
            f"{name} takes no argument named optimizer, so {optimizer!r} can not be chosen; "
            f"the learning rate belongs to the optimizer: write def "
            f"{name.rpartition('.')[2]}(optimizer='adamw') and choose both there"
        )
    arguments = {} if optimizer is None else {"optimizer": optimizer}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{name} is not a run: {error}") from error
    made = function(**arguments)
    runs = made if isinstance(made, list) else [made]
    strange = [run for run in runs if not isinstance(run, Run)]
    if strange or not runs:
        found = type(strange[0]).__name__ if strange else "an empty list"
        raise ValueError(f"{name} should return a Run or a list of Runs, but returned {found}")
    return runs


def make_run(name: str, *, optimizer: str | None = None) -> Run:
    """Make the one Run behind a name.

    Args:
        name: dotted path of a function that returns a Run.
        optimizer: as in ``make_runs``.

    Raises:
        ValueError: as ``make_runs``, and for a grid.

    Example:
        >>> make_run("gpt2_pretraining.demo", optimizer="adamw").optimizer.name
        'adamw'
    """
    runs = make_runs(name, optimizer=optimizer)
    if len(runs) > 1:
        raise ValueError(f"{name} is a grid of {len(runs)} runs; try: nomadam compare {name}")
    return runs[0]


def read_run(folder: str | Path) -> Run:
    """Read the Run of a run folder.

    Raises:
        ValueError: the folder is no run folder, or its Run does not hold together.
    """
    header = RunFolder(folder).read_header()
    if header is None:
        raise ValueError(f"{folder} is no run folder: it holds no run.json with a run")
    return from_json(header["run"])


def default_folder(run: Run, *, repeats: Path | None = None) -> Path:
    """Return the folder that a Run finds again: its name and a short hash, below ``runs``.

    Args:
        run: the Run.
        repeats: a run folder that is to be repeated; the folder is then another one.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> default_folder(demo()).name.startswith("gpt2_pretraining.demo-")
        True
    """
    folder = Path("runs", f"{run.name}-{short_hash(run)}")
    if repeats is not None and folder.resolve() == repeats.resolve():
        return folder.with_name(f"{folder.name}-repeated")
    return folder
