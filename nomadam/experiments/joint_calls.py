"""Calls in fresh processes, made by all processes of a launcher at the same time.

The first process decides what is called. The others call the same, so that their children meet one
another as the processes of a launcher do, under a name of its own for each call.
"""

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

from nomadam.experiments import processes
from nomadam.experiments.child_process import Outcome, run_in_child

POLL_SECONDS = 0.05
END = b""


@contextlib.contextmanager
def leading() -> Iterator[Callable[..., Outcome]]:
    """Give what calls a function in a fresh process: of each process, where there are several.

    It is used as `run_in_child` is, by the first process alone; the others `follow` until the
    context ends. Its Outcome is that of the first process's child.

    Example:
        >>> with leading() as call:
        ...     call is run_in_child
        True
    """
    if processes.count() == 1:
        yield run_in_child
        return
    store = _store()
    calls = 0

    def call(function: Callable[..., Any], *arguments: Any) -> Outcome:
        nonlocal calls
        store.set(_name(calls), pickle.dumps((function, arguments)))
        calls += 1
        return _call(calls - 1, function, arguments)

    try:
        yield call
    finally:
        store.set(_name(calls), END)


def follow(tell: Callable[[str], None]) -> None:
    """Make the calls that the first process makes, until it has made the last one.

    Args:
        tell: takes the error of a call that failed in this process's child.

    Raises:
        KeyboardInterrupt: as `run_in_child`.
    """
    store, calls = _store(), 0
    while True:
        try:
            while not store.check([_name(calls)]):
                time.sleep(POLL_SECONDS)  # unlike a wait in the store, a signal ends it
            message = store.get(_name(calls))
        except RuntimeError:  # the first process has ended, and the store with it
            return
        if message == END:
            return
        outcome = _call(calls, *pickle.loads(message))
        if outcome.error is not None:
            tell(outcome.error)
        calls += 1


def _store() -> Any:
    """What the launcher lets its processes write to one another, or the first process holds."""
    store = processes.meeting_place("calls")
    # The children are to find it there, and not to hold one themselves.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return store


def _name(calls: int) -> str:
    return f"call {calls}"


def _call(calls: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
    os.environ[processes.GROUP] = _name(calls)
    return run_in_child(function, *arguments)
