"""Which Runs and Studies there are, and the function behind a dotted name."""

import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomadam.experiments.configuration import Made, Run, from_json, short_hash
from nomadam.experiments.study import Study
from nomadam.runs import RunFolder

PACKAGE = "nomadam.experiments"
LISTED = ("Run", "list[Run]", "Study")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A function that returns a Run, a list of Runs or a Study.

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
    level of a public file, annotated to return ``Run``, ``list[Run]``, ``Study`` or a subclass
    of ``Study`` from the same file.

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
    body = ast.parse(path.read_bytes()).body
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    own = [each.name for each in classes if "Study" in map(ast.unparse, each.bases)]
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns:
            returns = ast.unparse(node.returns).strip("'\"").replace("configuration.", "")
            if returns in (*LISTED, *own) and not _required_arguments(node):
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


def make_all(name: str, *, optimizer: str | None = None) -> list[Run] | list[Study]:
    """Call the function behind a name; a single Run or Study comes as a list of one.

    Args:
        name: dotted path of a function that returns a Run, a list of Runs or a Study.
        optimizer: passed on as ``optimizer=``; default: the function's own choice.

    Raises:
        ValueError: an unknown name; a function that takes no ``optimizer`` where one is asked
            for, that needs further arguments, or that returns something else.

    Example:
        >>> make_all("gpt2_pretraining.demo", optimizer="sgdm")[0].name
        'gpt2_pretraining.demo'
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
    if isinstance(made, Study):
        return [made]
    runs = made if isinstance(made, list) else [made]
    strange = [run for run in runs if not isinstance(run, Run)]
    if strange or not runs:
        found = type(strange[0]).__name__ if strange else "an empty list"
        raise ValueError(f"{name} should return a Run or a list of Runs, but returned {found}")
    return runs


def make_runs(name: str, *, optimizer: str | None = None) -> list[Run]:
    """Call the function behind a name and return its Runs; a single Run as a list of one.

    Args:
        name: as in ``make_all``.
        optimizer: see there.

    Raises:
        ValueError: as ``make_all``, and for a study that is not of trainings alone.

    Example:
        >>> make_runs("gpt2_pretraining.demo", optimizer="sgdm")[0].optimizer.name
        'sgdm'
    """
    runs = [made for made in make_all(name, optimizer=optimizer) if isinstance(made, Run)]
    if not runs:
        raise ValueError(f"{name} is a study and no training; try: nomadam run {name}")
    return runs


def make_one(name: str, *, optimizer: str | None = None) -> Run | Study:
    """Make the one Run or Study behind a name.

    Args:
        name: as in ``make_all``.
        optimizer: see there.

    Raises:
        ValueError: as ``make_all``, and for a grid.

    Example:
        >>> make_one("gpt2_pretraining.demo").name
        'gpt2_pretraining.demo'
    """
    return _single(name, make_all(name, optimizer=optimizer))


def make_run(name: str, *, optimizer: str | None = None) -> Run:
    """Make the one Run behind a name.

    Args:
        name: as in ``make_all``.
        optimizer: see there.

    Raises:
        ValueError: as ``make_runs``, and for a grid.

    Example:
        >>> make_run("gpt2_pretraining.demo", optimizer="adamw").optimizer.name
        'adamw'
    """
    return _single(name, make_runs(name, optimizer=optimizer))


def _single(name: str, made: Sequence[Made]) -> Made:
    if len(made) > 1:
        raise ValueError(f"{name} is a grid of {len(made)} runs; try: nomadam compare {name}")
    return made[0]


def read_run(folder: str | Path) -> Run | Study:
    """Read the Run or Study of a run folder.

    Raises:
        ValueError: the folder is no run folder, or what it describes does not hold together.
    """
    header = RunFolder(folder).read_header()
    if header is None:
        raise ValueError(f"{folder} is no run folder: it holds no run.json with a run")
    return from_json(header["run"])


def default_folder(run: Run | Study, *, repeats: Path | None = None) -> Path:
    """Return the folder that a Run finds again: its name and a short hash, below ``runs``.

    Args:
        run: the Run or Study.
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
