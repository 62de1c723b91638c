"""What is shown by something else than one training: a table, or a training that is watched."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nomadam.experiments.fields import check_types, require
from nomadam.runs import FORMAT, RunFolder

Cell = str | int | float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of what was found, as the report and the command line show it.

    Args:
        title: what is in it.
        heads: of the columns, the units in them.
        rows: as long as the heads; numbers are rounded where they are shown, None is a dash.
        note: what a reader has to know of it.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What a study found.

    Args:
        numbers: by name, for ``result.json``.
        tables: for ``tables.json``.
    """

    numbers: Mapping[str, float | None]
    tables: Sequence[Table] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Something that can be run, listed and repeated like a Run, and is not one training.

    A subclass has fields of its own and a `measure`. Whatever is finished of it is kept as a file
    of `parts_of` its folder, so that the same command goes on.

    Args:
        name: dotted path of the function that made it.

    Raises:
        ValueError: naming the field, its value and its range.

    Example:
        >>> from nomadam.experiments.memory_and_step_time import demo
        >>> demo().name
        'memory_and_step_time.demo'
    """

    name: str

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self)
        dotted = re.fullmatch(r"\w+(\.\w+)*", self.name)
        require(dotted is not None, "name", self.name, "a dotted path")

    def measure(
        self,
        home: RunFolder,
        *,
        device: str,
        cache: str | Path | None,
        make_progress: Callable[[str, int], Any],
        tell: Callable[[str], None],
    ) -> Findings:
        """Find what the study is to show, going on from the parts that are there.

        Args:
            home: its folder, locked; `parts_of` it keeps what is finished.
            device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
            cache: folder for prepared data; None for the user's cache folder.
            make_progress: makes a context manager from label and steps, called with each record of
                a training.
            tell: takes a line of progress.
        """
        raise NotImplementedError

    def execute(
        self,
        folder: str | Path,
        *,
        make_progress: Callable[[str, int], Any],
        device: str = "auto",
        cache: str | Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
        again: bool = False,
    ) -> dict[str, Any]:
        """Carry the study out in a folder, going on from what the folder holds.

        The folder is that of a Run: ``run.json``, ``environment.json``, and ``result.json``, which
        is written last; beside them ``tables.json``.

        Args:
            folder: made where it is missing; one with a result is left as it is.
            make_progress: as `measure` takes it, like device, cache and tell.
            device: see there.
            cache: see there.
            tell: see there.
            again: from the beginning, though the folder holds parts or a result.

        Returns:
            The content of ``result.json``: ``status`` and the numbers that were found.

        Raises:
            ValueError: for a device or data that can not be had.
            RunFolderError: a ValueError: the folder holds something else, is in use, or is damaged.
            DiskFullError: an OSError; what is finished is intact.
            KeyboardInterrupt: interrupted; what is finished is kept.
        """
        # Imported here: configuration knows this class.
        from nomadam.experiments.configuration import differing_fields, to_json

        home = RunFolder(folder)
        home.check_run(to_json(self), differing_fields)
        if not again and (result := home.read_result()) is not None:
            return result
        with home.locked("working"):
            if again:
                home.clear()
                shutil.rmtree(parts_of(home).path, ignore_errors=True)
            home.write_json("run.json", {"format": FORMAT, "run": to_json(self), "data": {}})
            self._write_environment(home, device)
            options = {"device": device, "cache": cache, "tell": tell}
            found = self.measure(home, make_progress=make_progress, **options)
            tables = [dataclasses.asdict(table) for table in found.tables]
            home.write_json("tables.json", {"tables": tables})
            home.write_json("result.json", {"status": "finished", **found.numbers})
            return home.read_json("result.json")

    def _write_environment(self, home: RunFolder, device: str) -> None:
        """Write where it runs; where it goes on, where it began stays and this is added."""
        from nomadam.experiments import resources

        surroundings = resources.environment(resources.device_named(device))
        begun = home.read_object("environment.json") if parts_of(home).path.exists() else None
        if begun is not None:
            earlier = begun.get("resumed")
            earlier = earlier if isinstance(earlier, list) else []
            surroundings = {**begun, "resumed": [*earlier, surroundings]}
        home.write_json("environment.json", surroundings)


def parts_of(home: RunFolder) -> RunFolder:
    """The folder in a study's folder where each part that is finished has its file.

    Example:
        >>> parts_of(RunFolder("runs/study")).path.name
        'parts'
    """
    return RunFolder(home.path / "parts")
