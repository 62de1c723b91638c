"""Call a function in fresh processes, so that its memory is its own and its crash ends only it."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a call in a child process.

    Args:
        value: what the function returned, None where it failed.
        error: the failure in one message, None where there was none.
        traceback: the child's traceback, or the empty text.
        bad_input: whether the failure was a ``ValueError``, that is, of the user's making.
    """

    value: Any = None
    error: str | None = None
    traceback: str = ""
    bad_input: bool = False


def explain(error: BaseException) -> str:
    """Put an exception into one message for a reader who does not want a traceback.

    Example:
        >>> explain(ValueError("steps is 0, should be at least 1"))
        'steps is 0, should be at least 1'
        >>> explain(KeyError("loss"))
        "KeyError: 'loss'"
    """
    message = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    if isinstance(error, (ValueError, ImportError, OSError)) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def run_in_child(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Call ``function(*arguments)`` in a fresh interpreter and wait for it.

    The child has this process's standard output and error, and an empty standard input. Ctrl-C
    reaches the function once, as a ``KeyboardInterrupt``, whether it was typed at the terminal
    or sent to this process alone; a second one kills the child. Where this process dies first
    the child is interrupted too.

    Args:
        function: a function at the top level of an importable module.
        arguments: anything that can be pickled.

    Returns:
        The Outcome; an exception or a crash of the child is one, not an exception here.

    Raises:
        KeyboardInterrupt: this process or the child was interrupted; the child has ended by then.
            Its message is that of the child's ``KeyboardInterrupt``.
    """
    return run_in_children(function, [arguments])[0]


def run_in_children(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]
) -> list[Outcome]:
    """Make several calls at once, each in a fresh interpreter, and wait for all of them.

    Args:
        function: as `run_in_child` takes it.
        calls: the arguments of each call.

    Returns:
        An Outcome a call, in their order.

    Raises:
        KeyboardInterrupt: as `run_in_child`; all children have ended by then.
    """
    children: list[_Child] = []
    try:
        for arguments in calls:
            children.append(_Child(function, arguments))
        interrupted = _listen(children)
    finally:
        for child in children:
            child.close()
    words = [child.outcome for child in children if isinstance(child.outcome, str)]
    if words:
        raise KeyboardInterrupt(words[0])
    if interrupted:
        raise KeyboardInterrupt
    return [
        child.outcome
        if isinstance(child.outcome, Outcome)
        else Outcome(error=_how_it_ended(child.process.exitcode or 0))
        for child in children
    ]


class _Child:
    """A process that makes one call, and what has come from it so far."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(sender, function, arguments))
        self.ready = self.ended = False
        self.outcome: Outcome | str | None = None
        # The child inherits that SIGINT is ignored, until it is ready to answer it in good order.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        sender.close()

    def read(self) -> None:
        """Take its next message, or its end."""
        try:
            message = self.receiver.recv()
        except (EOFError, OSError):
            self.ended = True
            return
        if message == "ready":
            self.ready = True
        else:
            self.outcome, self.ended = message, True

    def interrupt(self) -> None:
        """Pass an interruption on; one that can not answer yet has nothing to lose."""
        # Its first message may have come without having been read.
        if self.ready or self.receiver.poll():
            assert self.process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)
        else:
            self.process.kill()

    def close(self) -> None:
        """Have it end."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.receiver.close()


def _listen(children: Sequence[_Child]) -> bool:
    """Wait for the end of all; pass one interruption on, leave at the second.

    Returns whether there was one.
    """
    interrupted = False
    while running := [child for child in children if not child.ended]:
        # All of it: an interruption while a message is read must reach the children too.
        try:
            multiprocessing.connection.wait([child.receiver for child in running])
            for child in running:
                if child.receiver.poll():
                    child.read()
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            for child in running:
                child.interrupt()
    for child in children:
        child.process.join()
    return interrupted


def _how_it_ended(exitcode: int) -> str:
    if exitcode >= 0:
        return f"the process ended without a result, with exit code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{hint}"


def _child(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answered = False

    def interrupt_once(number: int, frame: Any) -> None:
        # Typed at a terminal, Ctrl-C arrives twice: from the terminal and from the parent.
        nonlocal answered
        if not answered:
            answered = True
            raise KeyboardInterrupt

    message: Outcome | str
    try:
        signal.signal(signal.SIGINT, interrupt_once)
        threading.Thread(target=_watch_parent, daemon=True).start()
        sender.send("ready")
        message = Outcome(value=function(*arguments))
    except KeyboardInterrupt as error:
        message = str(error)
    except Exception as error:
        message = Outcome(
            error=explain(error),
            traceback=traceback.format_exc(),
            bad_input=isinstance(error, ValueError),
        )
    with contextlib.suppress(BrokenPipeError):
        sender.send(message)


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGINT)
