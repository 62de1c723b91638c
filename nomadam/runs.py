"""The run folder: what a training leaves behind, whole after a kill at any instant."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nomadam.durable_files import PARTIAL, lock, remove_folder, sha256, sync, write_atomically

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


class DiskFullError(OSError):
    """The disk is full; what was written before is intact."""


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
            RunFolderError: where the file is not JSON.
        """
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            message = f"{self.path / name} is damaged ({error}); delete the folder to start again"
            raise RunFolderError(message) from error

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
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file, not a folder; choose another folder")
        held = self.read_json("run.json")
        if held is None:
            return
        if not isinstance(held, dict) or not isinstance(held.get("run"), dict):
            raise RunFolderError(f"{self.path / 'run.json'} describes no run; choose another one")
        if fields := differing(held["run"], run):
            raise AnotherRunError(self.path, fields)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; the lock dies with the process, however it dies.

        Raises:
            FolderInUseError: another process has it.
        """
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / ".lock", "ab")
        with file:
            try:
                lock(file)
            except OSError as error:
                message = f"another process is training in {self.path}; wait for it, or end it"
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
        """The records of ``metrics.jsonl`` before the first line that is torn or missing."""
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
            except ValueError:
                return
            whole = line.endswith(b"\n") and isinstance(record, dict)
            if not whole or record.get("step") != number:
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
            damage = _damage(path)
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
            if not _is_disk_full(error):
                raise
            kept = [step for step, _ in self._all_checkpoints()]
            intact = f"the checkpoint of step {kept[-1]} is intact" if kept else "nothing is lost"
            message = f"no space left for {self.path}; {intact}: free some and run the same again"
            raise DiskFullError(errno.ENOSPC, message) from error


def _is_disk_full(error: BaseException | None) -> bool:
    # torch hides the OSError behind one of its own, safetensors tells of it in words only.
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "no space left on device" in str(error).lower():
            return True
        error = error.__context__
    return False


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file at once or not at all; numbers that are not finite become null.

    Raises:
        OSError: where it can not be written; an old file is intact then.
    """
    text = json.dumps(finite(values), indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def finite(values: Any) -> Any:
    """The same JSON values with None in the place of numbers that are not finite.

    Example:
        >>> finite({"loss": float("inf"), "steps": [1, 2.5]})
        {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(values, Mapping):
        return {str(name): finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is whole."""
    try:
        sums = json.loads((checkpoint / "checksums.json").read_bytes())
        for name, expected in sums.items():
            if sha256(checkpoint / Path(name).name) != expected:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, AttributeError) as error:
        return f"it is incomplete ({error})"
    return None if "state.json" in sums else "checksums.json does not list state.json"
