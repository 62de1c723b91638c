"""Ctrl-C and SIGTERM during a training: noted at once, answered between two steps."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

# A second Ctrl-C within this time is the same one, passed on by a parent process too.
SECONDS_APART = 2.0


class StopSignals:
    """A context in which SIGINT and SIGTERM ask for an end instead of causing one.

    A second signal, at least two seconds after the first, is a `KeyboardInterrupt` at once. Outside
    the main thread, where Python sets no handlers, nothing is changed.

    Attributes:
        signal_name: the first signal, such as ``SIGINT``; empty where there was none.

    Example:
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGINT)
        ...     stop.requested
        True
    """

    def __init__(self) -> None:
        """See the class."""
        self.signal_name = ""
        self._first = 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal_name)

    def __enter__(self) -> Self:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.signal_name, self._first = signal.Signals(number).name, now
        elif now - self._first > SECONDS_APART:
            raise KeyboardInterrupt
