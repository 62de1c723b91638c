"""The run folder: what a training leaves behind, whole after a kill at any instant."""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nomadam.durable_files import (
    PARTIAL,
    disk_full_told,
    finite,
    is_disk_full,
    is_number,
    lock,
    remove_folder,
    sha256,
    sync,
    write_atomically,
    write_json,
)
from nomadam.durable_files import DiskFullError as DiskFullError

FORMAT = 1
CHECKPOINTS_KEPT = 2
# What differs between a training and its repetition; everything else in the metrics is the same.
TIMINGS = ("seconds", "step_ms", "optimizer_ms", "peak_memory_mb")


class RunFolderError(ValueError):
    """A run folder can not be used as asked; the message says why and what to do."""


class AnotherRunError(RunFolderError):
    """The folder holds another Run.

    Args:
        folder: the run folder.
        fields: dotted field to the pair (in the folder, asked for); kept as an attribute.
    """

    def __init__(self, folder: Path, fields: Mapping[str, tuple[Any, Any]]) -> None:
        """See the class."""
        self.fields = dict(fields)
        lines = [f"  {name}: {held!r} there, {new!r} here" for name, (held, new) in fields.items()]
        super().__init__(
            f"{folder} holds another run, choose another folder; they differ in\n"
            + "\n".join(lines)
        )


class FolderInUseError(RunFolderError):
    """Another process is training in the folder."""


class Interrupted(KeyboardInterrupt):
    """A training was stopped by a signal and can go on; its arguments are kept as attributes.

    Args:
        folder: the run folder.
        step: the last step that is kept in a checkpoint, 0 where there is none.
        steps: of the whole training.
        signal_name: such as ``SIGINT``.
    """

    def __init__(self, folder: Path, step: int, steps: int, signal_name: str) -> None:
        """See the class."""
        self.step, self.folder, self.signal_name = step, folder, signal_name
        how = f"goes on after step {step} of {steps}" if step else "starts it from the beginning"
        super().__init__(f"stopped by {signal_name}; the same command {how} (run folder {folder})")


class RunFolder:
    """A run folder and its files; nothing is made before the first write.

    Args:
        path: the folder.

    Example:
        >>> import tempfile
        >>> folder = RunFolder(Path(tempfile.mkdtemp()) / "run")
        >>> folder.write_json("result.json", {"validation_loss": float("nan")})
        >>> folder.read_json("result.json")
        {'validation_loss': None}
    """

    def __init__(self, path: str | Path) -> None:
        """See the class."""
        self.path = Path(path)
        self._metrics: IO[bytes] | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def read_json(self, name: str) -> Any:
        """The content of one of its JSON files, None where there is no such file.

        Raises:
            RunFolderError: where the file is not JSON, or the folder is a file.
        """
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            refuse_file(self.path)
            raise
        except (ValueError, RecursionError) as error:
            raise self._damaged(name, str(error)) from error

    def read_object(self, name: str) -> dict[str, Any] | None:
        """As `read_json`, of a file that has to hold a JSON object.

        Raises:
            RunFolderError: where it does not.
        """
        values = self.read_json(name)
        if not isinstance(values, dict) and (self.path / name).exists():
            raise self._damaged(name, "no JSON object")
        return values

    def read_header(self) -> dict[str, Any] | None:
        """The content of ``run.json``: the Run and the data; None where there is none.

        Raises:
            RunFolderError: where it describes no run.
        """
        held = self.read_object("run.json")
        if held is not None:
            parts = [held.get("run"), held.get("data", {})]
            if not all(isinstance(part, dict) for part in parts):
                raise RunFolderError(
                    f"{self.path / 'run.json'} describes no run and its data; choose another folder"
                )
        return held

    def read_result(self) -> dict[str, Any] | None:
        """The content of ``result.json``; None where the training has not ended.

        Raises:
            RunFolderError: for another status than ``finished`` and ``diverged``, and for a
                value that is neither a finite number nor null.
        """
        result = self.read_object("result.json")
        if result is not None:
            if result.get("status") not in ("finished", "diverged"):
                raise self._damaged("result.json", "its status is not finished or diverged")
            for name, value in result.items():
                if name != "status" and value is not None and not is_number(value):
                    raise self._damaged("result.json", f"{name} is no number and not null")
        return result

    def _damaged(self, name: str, why: str) -> RunFolderError:
        message = f"{self.path / name} is damaged ({why}); delete the folder to start again"
        return RunFolderError(message)

    def write_json(self, name: str, values: Any) -> None:
        """Write one of its JSON files at once or not at all; non-finite numbers become null.

        Raises:
            DiskFullError: the old file, if there is one, is intact.
        """
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / name, values)

    def check_run(
        self,
        run: Mapping[str, Any],
        differing: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, tuple]],
    ) -> None:
        """Refuse a folder that holds another Run.

        Args:
            run: the Run as JSON.
            differing: gives the fields in which two Runs, as JSON, differ.

        Raises:
            AnotherRunError: with the differing fields.
            RunFolderError: for a folder that is a file, or whose ``run.json`` is damaged.
        """
        refuse_file(self.path)
        held = self.read_header()
        if held is not None and (fields := differing(held["run"], run)):
            raise AnotherRunError(self.path, fields)

    @contextlib.contextmanager
    def locked(self, doing: str = "training") -> Iterator[None]:
        """Keep other processes out; the lock dies with the process, however it dies.

        Args:
            doing: what the other processes are told; default ``training``.

        Raises:
            FolderInUseError: another process has it.
            RunFolderError: the folder is, or lies below, a file.
        """
        refuse_file(self.path)
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / ".lock", "ab")
        with file:
            try:
                lock(file)
            except OSError as error:
                message = f"another process is {doing} in {self.path}; wait for it, or end it"
                raise FolderInUseError(message) from error
            self._remove_leftovers()
            try:
                yield
            finally:
                self.close()

    def clear(self) -> None:
        """Remove what a training wrote, so that it starts from the beginning."""
        # The result goes first: what remains after a kill between two of these can be resumed.
        for name in ("result.json", "gains.json", "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        for _, checkpoint in self._all_checkpoints():
            remove_folder(checkpoint)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def close(self) -> None:
        """Close the metrics file."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    # Metrics: one line a step, from step 1 without a gap.

    def metrics(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl`` before the first line that is torn or no record."""
        return [record for _, record in self._lines()]

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the record of a step; non-finite numbers become null.

        Raises:
            DiskFullError: a torn line may remain, which resuming cuts off.
        """
        line = json.dumps(finite(dict(record)), allow_nan=False) + "\n"
        with self._explained():
            if self._metrics is None:
                self._metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)
            rest = memoryview(line.encode())
            while rest:
                rest = rest[self._metrics.write(rest) :]

    def keep_metrics(self, steps: int) -> None:
        """Cut ``metrics.jsonl`` after this step, at once or not at all."""
        self.close()
        kept = b"".join(line for line, record in self._lines() if record["step"] <= steps)
        path = self.path / "metrics.jsonl"
        if not path.exists() or path.read_bytes() != kept:
            with self._explained():
                write_atomically(path, kept)

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        try:
            lines = (self.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return
            whole = line.endswith(b"\n") and isinstance(record, dict)
            if not whole or record.get("step") != number or not _is_record(record):
                return
            yield line, record

    # Checkpoints: step_00000100/, complete whenever it has this name.

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Make the checkpoint of a step, at once or not at all, and remove the older ones.

        Args:
            step: at least 1.
            write: writes the files of the checkpoint into the folder that it is given.

        Returns:
            The checkpoint's folder.

        Raises:
            DiskFullError: the earlier checkpoints are intact.
        """
        final = self.checkpoints / f"step_{step:08d}"
        partial = self.checkpoints / f".{final.name}{PARTIAL}"
        with self._explained():
            if self._metrics is not None:
                os.fsync(self._metrics.fileno())
            partial.mkdir(parents=True)
            try:
                write(partial)
                sums = {file.name: sha256(file) for file in sorted(partial.iterdir())}
                (partial / "checksums.json").write_text(json.dumps(sums, indent=2) + "\n")
                for file in partial.iterdir():
                    sync(file)
                sync(partial)
                if final.exists():
                    remove_folder(final)
                partial.rename(final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync(self.checkpoints)
        # Later ones were passed over when this training began: damaged, or without their metrics.
        kept = self._all_checkpoints()
        older = [path for each, path in kept if each <= step]
        later = [path for each, path in kept if each > step]
        for old in (*older[:-CHECKPOINTS_KEPT], *later):
            remove_folder(old)
        return final

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """The newest checkpoint that is whole and whose metrics are; None where there is none.

        Warns:
            UserWarning: for each checkpoint that is damaged and passed over.
        """
        steps = len(self.metrics())
        for step, path in reversed(self._all_checkpoints()):
            damage = _damage(path, step)
            if damage is None and step > steps:
                damage = f"metrics.jsonl ends at step {steps}"
            if damage is None:
                return step, path
            warnings.warn(f"{path} is passed over: {damage}", stacklevel=2)
        return None

    def _all_checkpoints(self) -> list[tuple[int, Path]]:
        if not self.checkpoints.is_dir():
            return []
        matches = [
            (re.fullmatch(r"step_(\d{8,})", path.name), path) for path in self.checkpoints.iterdir()
        ]
        return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())

    def _remove_leftovers(self) -> None:
        """Remove what a killed process left half-written or half-removed."""
        for path in self.checkpoints.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(f".*{PARTIAL}"):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            kept = [step for step, _ in self._all_checkpoints()]
            intact = f"the checkpoint of step {kept[-1]} is intact" if kept else "nothing is lost"
            with disk_full_told(self.path, f"{intact}: free some and run the same again"):
                raise


def refuse_file(path: Path) -> None:
    """Refuse a folder that is, or lies below, a file.

    Raises:
        RunFolderError: naming the file.
    """
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            below = "" if place == path else f"{path} can not be made: "
            raise RunFolderError(f"{below}{place} is a file, not a folder; choose another folder")


def _is_record(record: Mapping[str, Any]) -> bool:
    needed = all(is_number(record.get(name)) for name in ("tokens", "seconds"))
    return needed and all(value is None or is_number(value) for value in record.values())


def _damage(checkpoint: Path, step: int) -> str | None:
    """What is wrong with the checkpoint of a step, None where it is whole."""
    try:
        sums = json.loads((checkpoint / "checksums.json").read_bytes())
        for name, expected in sums.items():
            if sha256(checkpoint / Path(name).name) != expected:
                return f"{name} does not have its checksum"
        if "state.json" not in sums:
            return "checksums.json does not list state.json"
        state = json.loads((checkpoint / "state.json").read_bytes())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"it is incomplete ({error})"
    if not isinstance(state, dict) or state.get("step") != step:
        return f"state.json is not of step {step}"
    if not is_number(state.get("seconds")) or not state.get("random"):
        return "state.json lacks the seconds or the random generators"
    return None if isinstance(state["random"], list) else "state.json has no list 'random'"
