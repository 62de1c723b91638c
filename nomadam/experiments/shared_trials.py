"""The trials of a search in a database, worked off by many processes: none lost, none done twice.

A search has N slots. Whoever takes one appends an *attempt* to it: a trial of the optuna study in
state RUNNING, which bears the number of its slot and of the attempt. The database numbers trials
in the order in which they were appended, so of two processes that take one slot at once the lower
number has it, and the other marks its own attempt as failed. An attempt ends once: as COMPLETE by
whoever trains it, or as FAIL, after which the slot is free again. The database refuses to end it
twice, so a process that was taken for dead can not deliver a second result. No clocks are compared.
"""

import contextlib
import itertools
import math
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from nomadam.durable_files import lock
from nomadam.experiments.search_spaces import Search, Values
from nomadam.experiments.trial_storage import check_plan

BEAT_SECONDS = 15.0
# A process on another machine whose beat has not changed for so long is taken for dead.
GRACE_SECONDS = 120.0
# A trial whose process crashes so often is left to the next command.
TRIES = 3


class Worker:
    """A process that takes trials; others on this machine see at once when it has died.

    It holds the lock of a file, which the system releases however the process ends.

    Args:
        folder: of the search; the file is made in it.
        session: what the workers of one command have in common.
    """

    def __init__(self, folder: Path, session: str) -> None:
        """See the class."""
        self.session, self.name = session, uuid.uuid4().hex[:12]
        self.folder, self.host = folder, platform.node()
        self.beats = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        self._path = _lock_of(folder, self.name)
        self._file = open(self._path, "ab")
        lock(self._file)

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the lock."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def sees(self, host: str, name: str) -> bool | None:
        """Whether another worker is alive; None where that can not be seen from here."""
        path = _lock_of(self.folder, name)
        if host != self.host or not path.exists():
            return None
        return _is_locked(path)


def forget_dead_workers(folder: Path) -> None:
    """Remove the files of workers that have died; before, they tell that these are dead."""
    for path in folder.glob(".worker-*.lock"):
        if not _is_locked(path):
            path.unlink(missing_ok=True)


def _lock_of(folder: Path, name: str) -> Path:
    return folder / f".worker-{name}.lock"


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "ab") as file:
            lock(file)
    except OSError:
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An attempt at a slot that this process has won.

    Args:
        slot: which trial of the search, from 0.
        attempt: how many there were before at this slot.
        number: of the attempt, in the optuna study.
        values: dotted field to value.
    """

    slot: int
    attempt: int
    number: int
    values: Values


@dataclass(kw_only=True)
class SharedTrials:
    """The slots of one search.

    Args:
        search: what is searched.
        budget: number of slots, at least 1.
        study: the optuna study, from `open_study`.
        worker: this process.
        suggest: gives the values of a slot from its index and the trials that are known.
        grace_seconds: until a silent process of another machine is taken for dead.
    """

    search: Search
    budget: int
    study: Any
    worker: Worker
    suggest: Callable[[int, Sequence[Any]], Values]
    grace_seconds: float = GRACE_SECONDS
    _beats: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def current(self) -> dict[int, Any]:
        """Slot to the attempt that counts, an optuna trial; slots never taken are missing."""
        return current_attempts(self.study.get_trials(deepcopy=False), self.budget)

    def claim(self) -> Claim | None:
        """Take the first free slot; None where there is none now.

        A slot whose process has died is free. Its values stay those of its first attempt.
        """
        from optuna.trial import TrialState, create_trial

        while True:
            check_plan(self.study, self.search.plan)
            current = self.current()
            free = (slot for slot in range(self.budget) if self._is_free(current.get(slot)))
            if (slot := next(free, None)) is None:
                return None
            before = current.get(slot)
            if before is None:
                alive = [each for each in current.values() if each.state != TrialState.FAIL]
                values = self.suggest(slot, alive)
            else:
                values = {name: before.params[name] for name in self.search.space}
            attempt = 0 if before is None else before.user_attrs["attempt"] + 1
            mark = uuid.uuid4().hex
            about = {"slot": slot, "attempt": attempt, "mark": mark}
            about |= {"worker": self.worker.name, "host": self.worker.host}
            self.study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=values,
                    distributions=self.search.distributions(),
                    user_attrs=about,
                )
            )
            trials = self.study.get_trials(deepcopy=False)
            number = next(each.number for each in trials if each.user_attrs.get("mark") == mark)
            if current_attempts(trials, self.budget)[slot].number == number:
                return Claim(slot=slot, attempt=attempt, number=number, values=values)
            self._end(number, TrialState.FAIL)

    def _is_free(self, attempt: Any) -> bool:
        from optuna.trial import TrialState

        if attempt is None:
            return True
        if attempt.state == TrialState.RUNNING and self._is_dead(attempt.user_attrs):
            return self._end(attempt.number, TrialState.FAIL)
        if attempt.state == TrialState.FAIL:
            return not self.given_up(attempt.user_attrs["slot"])
        return False

    def _is_dead(self, about: dict[str, Any]) -> bool:
        name = about["worker"]
        if (alive := self.worker.sees(about["host"], name)) is not None:
            return not alive
        beat, now = self.study.user_attrs.get(f"beat {name}"), time.monotonic()
        if name not in self._beats or self._beats[name][0] != beat:
            self._beats[name] = (beat, now)
        return now - self._beats[name][1] > self.grace_seconds

    @contextlib.contextmanager
    def kept_alive(self, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
        """A context in which other machines see that this process lives."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.is_set():
                # A database that is away for a while is no reason to stop training.
                with contextlib.suppress(Exception):
                    self.study.set_user_attr(f"beat {self.worker.name}", next(self.worker.beats))
                ended.wait(beat_seconds)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def finish(self, claim: Claim, loss: float | None) -> bool:
        """Record the result of a claim.

        Args:
            claim: from `claim`.
            loss: final validation loss, None of a training that diverged.

        Returns:
            Whether it counts; False where this process was taken for dead in the meantime.
        """
        from optuna.trial import TrialState

        value = math.inf if loss is None else loss
        return self._end(claim.number, TrialState.COMPLETE, value)

    def give_back(self, claim: Claim, error: str | None = None, *, last: bool = False) -> None:
        """Leave a slot to whoever takes it next.

        Args:
            claim: from `claim`.
            error: why its training failed; None where it was interrupted.
            last: whether another try is pointless for the workers of this session.
        """
        from optuna.trial import TrialState

        if error is not None:
            about = {"session": self.worker.session, "error": error, "last": last}
            self.study.set_user_attr(f"error {claim.slot} {claim.attempt}", about)
        self._end(claim.number, TrialState.FAIL)

    def errors(self, slot: int) -> list[dict[str, Any]]:
        """What went wrong at a slot, in the workers of this session."""
        attrs = self.study.user_attrs
        found = [each for key, each in attrs.items() if key.startswith(f"error {slot} ")]
        return [each for each in found if each["session"] == self.worker.session]

    def given_up(self, slot: int) -> bool:
        """Whether the workers of this session leave a slot that has failed to the next command."""
        errors = self.errors(slot)
        return len(errors) >= TRIES or any(each["last"] for each in errors)

    def open_slots(self) -> list[int]:
        """The slots that are neither done nor given up: free, or in training somewhere."""
        from optuna.trial import TrialState

        states = {slot: attempt.state for slot, attempt in self.current().items()}
        return [
            slot
            for slot in range(self.budget)
            if states.get(slot) != TrialState.COMPLETE
            and not (states.get(slot) == TrialState.FAIL and self.given_up(slot))
        ]

    def _end(self, number: int, state: Any, value: float | None = None) -> bool:
        """End an attempt; False where it has ended already."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            self.study.tell(number, value, state=state)
        except UpdateFinishedTrialError:
            return False
        except ValueError:
            ended = [each for each in self.study.get_trials() if each.number == number]
            if not ended or not ended[0].state.is_finished():
                raise
            return False
        return True


def current_attempts(trials: Iterable[Any], budget: int) -> dict[int, Any]:
    """Slot to its last attempt; of several with one number, the one that was appended first."""
    current: dict[int, Any] = {}
    for trial in sorted(trials, key=lambda each: each.number):
        slot, attempt = (trial.user_attrs.get(name) for name in ("slot", "attempt"))
        if slot is not None and slot < budget:
            if slot not in current or attempt > current[slot].user_attrs["attempt"]:
                current[slot] = trial
    return current
