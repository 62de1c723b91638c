import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from nomadam.experiments import child_process
from nomadam.experiments.child_process import explain, run_in_child, run_in_children


def answer(a, b):
    return os.getpid(), a + b


def fail_badly():
    raise ValueError("width = 0: must be at least 1")


def out_of_memory():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt_parent_then_save(parent, path):
    """As a training: interrupted, it writes what it has, and an impatient copy does no harm."""
    try:
        os.kill(parent, signal.SIGINT)
        while True:
            time.sleep(0.05)  # not `pause`, which a signal just before it does not end
    except KeyboardInterrupt:
        # The copy that a terminal sends to the whole process group.
        os.kill(os.getpid(), signal.SIGINT)
        path.write_text("saved")
        raise


def test_value_comes_from_another_process():
    outcome = run_in_child(answer, 2, 3)
    assert outcome.error is None
    pid, total = outcome.value
    assert total == 5
    assert pid != os.getpid()


def test_exception_is_an_outcome():
    outcome = run_in_child(fail_badly)
    assert outcome.error == "width = 0: must be at least 1"
    assert outcome.bad_input
    assert "fail_badly" in outcome.traceback


def test_crash_is_an_outcome():
    outcome = run_in_child(out_of_memory)
    assert outcome.value is None
    assert not outcome.bad_input
    assert "SIGKILL" in outcome.error
    assert "memory" in outcome.error


def test_interruption_reaches_the_child_once(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        run_in_child(interrupt_parent_then_save, os.getpid(), path)
    assert path.read_text() == "saved"
    # The parent's own handler is back.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def wait_and_save(folder):
    try:
        (folder / "ready").write_text(str(os.getpid()))
        while True:
            time.sleep(0.05)  # not `pause`, which a signal just before it does not end
    except KeyboardInterrupt:
        (folder / "saved").write_text("saved")


def wait_for(path, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)


def test_child_of_a_killed_parent_is_interrupted(tmp_path):
    script = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from nomadam.experiments.child_process import run_in_child
        from test_child_process import wait_and_save
        if __name__ == "__main__":
            run_in_child(wait_and_save, Path({str(tmp_path)!r}))
    """
    path = tmp_path / "parent.py"
    path.write_text(textwrap.dedent(script))
    parent = subprocess.Popen([sys.executable, str(path)])
    wait_for(tmp_path / "ready")
    parent.kill()
    parent.wait()
    wait_for(tmp_path / "saved")


def meet(folder, mine, other):
    (folder / mine).touch()
    wait_for(folder / other)
    return mine


def test_several_calls_run_at_once_and_are_answered_in_order(tmp_path):
    outcomes = run_in_children(meet, [(tmp_path, "a", "b"), (tmp_path, "b", "a")])
    assert [outcome.value for outcome in outcomes] == ["a", "b"]
    outcomes = run_in_children(answer, [(1, 2), (1, "2"), (3, 4)])
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]


def interrupt_parent_when_all_are_there(parent, folder, mine, other):
    try:
        meet(folder, mine, other)
        if mine == "a":
            os.kill(parent, signal.SIGINT)
        while True:
            time.sleep(0.05)  # not `pause`, which a signal just before it does not end
    except KeyboardInterrupt:
        (folder / f"{mine} saved").touch()
        raise


def test_an_interruption_reaches_all_children(tmp_path):
    calls = [(os.getpid(), tmp_path, *names) for names in ("ab", "ba")]
    with pytest.raises(KeyboardInterrupt):
        run_in_children(interrupt_parent_when_all_are_there, calls)
    assert (tmp_path / "a saved").exists() and (tmp_path / "b saved").exists()


def save_when_interrupted(folder, name):
    try:
        (folder / name).touch()
        while True:
            time.sleep(0.05)  # not `pause`, which a signal just before it does not end
    except KeyboardInterrupt:
        (folder / f"{name} saved").touch()
        raise


def test_an_interruption_while_a_message_is_read_reaches_all_children(tmp_path, monkeypatch):
    read, number = child_process._Child.read, iter(range(10))

    def read_and_be_interrupted(child):
        read(child)
        if next(number) == 1:  # both are ready
            wait_for(tmp_path / "a"), wait_for(tmp_path / "b")
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(child_process._Child, "read", read_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_children(save_when_interrupted, [(tmp_path, "a"), (tmp_path, "b")])
    assert (tmp_path / "a saved").exists() and (tmp_path / "b saved").exists()


def test_explanations_are_for_readers():
    try:
        open("/no/such/file")
    except OSError as error:
        assert explain(error) == "No such file or directory: /no/such/file"
    assert explain(ImportError('pip install "nomadam[lab]"')) == 'pip install "nomadam[lab]"'
    assert explain(RuntimeError("shape")) == "RuntimeError: shape"
    assert explain(RuntimeError()) == "RuntimeError"
