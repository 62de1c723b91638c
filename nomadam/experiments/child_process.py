"""Call a function in a fresh process, so that its memory is its own and its crash ends only it."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable
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
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments))
    # The child inherits that SIGINT is ignored, until it is ready to answer it in good order.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()
    try:
        outcome = _listen(receiver, process)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    return outcome


def _listen(receiver: Connection, process: Any) -> Outcome:
    """Wait for the child's end; pass one interruption on, leave at the second."""
    ready = interrupted = False
    outcome = None
    while outcome is None:
        try:
            multiprocessing.connection.wait([receiver])
        except KeyboardInterrupt:
            # Its first message may have come without having been read.
            if interrupted or not (ready or receiver.poll()):
                raise
            interrupted = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            continue
        try:
            message = receiver.recv()
        except (EOFError, OSError):
            break
        if message == "ready":
            ready = True
        else:
            outcome = message
    process.join()
    if isinstance(outcome, str):
        raise KeyboardInterrupt(outcome)
    if interrupted:
        raise KeyboardInterrupt
    return outcome or Outcome(error=_how_it_ended(process.exitcode))


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
