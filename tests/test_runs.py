"""The run folder, on its own: what is read back after kills, full disks and damage."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from nomadam.runs import (
    AnotherRunError,
    DiskFullError,
    FolderInUseError,
    RunFolder,
    RunFolderError,
)


def differing(held, new):
    return {name: (held[name], new[name]) for name in new if held[name] != new[name]}


def write_state(folder):
    step = int(folder.name.split("_")[1].split(".")[0])
    state = {"step": step, "seconds": 1.5, "random": [{}]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "weights").write_bytes(bytes(100_000))


@pytest.fixture
def home(tmp_path):
    return RunFolder(tmp_path / "run")


def record(step, **more):
    return {"step": step, "tokens": 10 * step, "seconds": 0.5 * step, "train_loss": 0.5, **more}


def filled(home, steps, every=5):
    home.write_json("run.json", {"run": {}})
    for step in range(1, steps + 1):
        home.append_metrics(record(step))
        if step % every == 0:
            home.save_checkpoint(step, write_state)
    home.close()


def test_json_is_read_back_and_not_finite_numbers_are_null(home):
    values = {"a": [float("nan"), float("inf"), 1.5], "b": {"c": -float("inf")}, "d": "tëxt"}
    home.write_json("result.json", values)
    assert home.read_json("result.json") == {
        "a": [None, None, 1.5],
        "b": {"c": None},
        "d": "tëxt",
    }
    assert [path.name for path in home.path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "content", [b"", b'{"status": ', b"\xff\xfe", b"NaN NaN", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_damaged_json_is_named(home, content):
    home.path.mkdir()
    (home.path / "result.json").write_bytes(content)
    with pytest.raises(RunFolderError, match="result.json is damaged"):
        home.read_json("result.json")


def test_a_missing_json_file_is_none(home):
    assert home.read_json("result.json") is None
    assert not home.path.exists()


def test_another_run_is_refused_with_its_fields(home):
    home.write_json("run.json", {"run": {"lr": 0.1, "steps": 6}})
    home.check_run({"lr": 0.1, "steps": 6}, differing)
    with pytest.raises(AnotherRunError, match=r"lr: 0.1 there, 0.2 here") as caught:
        home.check_run({"lr": 0.2, "steps": 6}, differing)
    assert caught.value.fields == {"lr": (0.1, 0.2)}


@pytest.mark.parametrize(
    "content",
    ["[]", "null", '{"run": 3}', "{}", '{"run": {}, "data": null}', '{"run": {}, "data": []}'],
)
def test_a_run_file_of_something_else_is_refused(home, content):
    home.path.mkdir()
    (home.path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"run.json (describes no run|is damaged)"):
        home.check_run({}, differing)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[1]",
        "null",
        '"finished"',
        '{"status": "unfinished"}',
        '{"status": ["finished"]}',
        '{"status": "finished", "validation_loss": "low"}',
        '{"status": "finished", "validation_loss": NaN}',
        '{"status": "finished", "steps": true}',
    ],
)
def test_a_result_of_something_else_is_refused(home, content):
    home.path.mkdir()
    (home.path / "result.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"result.json is damaged"):
        home.read_result()


@pytest.mark.parametrize("below", [".", "x", "x/y"])
def test_a_file_is_no_folder(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("something of the user's")
    home = RunFolder(file / below)
    with pytest.raises(RunFolderError, match=f"{file} is a file"):
        home.check_run({}, differing)
    with pytest.raises(RunFolderError, match=f"{file} is a file"):
        home.read_json("run.json")
    with pytest.raises(RunFolderError, match=f"{file} is a file"), home.locked():
        pass


@pytest.mark.parametrize(
    "rest",
    [
        b'{"step": 4, "train_lo',
        b'{"step": 4, "tokens": 40, "seconds": 2.0}',
        b'{"step": 9, "tokens": 90, "seconds": 4.5}\n',
        b'{"step": 4}\n',
        b'{"step": 4, "tokens": 40}\n',
        b'{"step": 4, "tokens": 40, "seconds": "2"}\n',
        b'{"step": 4, "tokens": true, "seconds": 2.0}\n',
        b'{"step": 4, "tokens": 40, "seconds": NaN}\n',
        b'{"step": 4, "tokens": 40, "seconds": 2.0, "train_loss": "low"}\n',
        b'{"step": 4, "tokens": 40, "seconds": 1%s}\n' % (b"0" * 400),
        b"[" * 100_000 + b"\n",
        b"\x00\x00\x00\n",
        b'[4]\n{"step": 4, "tokens": 40, "seconds": 2.0}\n',
        b'{"step": 3, "tokens": 30, "seconds": 1.5}\n',
    ],
)
def test_metrics_end_before_a_torn_or_strange_line(home, rest):
    filled(home, 3)
    path = home.path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert [record["step"] for record in home.metrics()] == [1, 2, 3]
    home.keep_metrics(3)
    assert path.read_bytes() == whole
    home.keep_metrics(1)
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]
    home.append_metrics(record(2))
    home.close()
    assert [record["step"] for record in home.metrics()] == [1, 2]


def test_the_last_two_checkpoints_are_kept(home):
    filled(home, 20)
    assert sorted(path.name for path in home.checkpoints.iterdir()) == [
        "step_00000015",
        "step_00000020",
    ]
    step, path = home.newest_checkpoint()
    assert step == 20
    sums = json.loads((path / "checksums.json").read_text())
    assert sorted(sums) == ["state.json", "weights"]


def flip_a_bit(path):
    content = bytearray((path / "weights").read_bytes())
    content[50_000] ^= 1
    (path / "weights").write_bytes(content)


DAMAGES = {
    "bit": flip_a_bit,
    "missing": lambda path: (path / "weights").unlink(),
    "short": lambda path: os.truncate(path / "weights", 10),
    "no sums": lambda path: (path / "checksums.json").unlink(),
    "torn sums": lambda path: (path / "checksums.json").write_text('{"state.json": "'),
    "empty sums": lambda path: (path / "checksums.json").write_text("{}"),
    "list for sums": lambda path: (path / "checksums.json").write_text("[]"),
    "outside": lambda path: (path / "checksums.json").write_text('{"../../run.json": "0"}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(home, damage):
    filled(home, 10)
    damage(home.checkpoints / "step_00000010")
    with pytest.warns(UserWarning, match="is passed over"):
        assert home.newest_checkpoint()[0] == 5
    damage(home.checkpoints / "step_00000005")
    with pytest.warns(UserWarning, match="is passed over"):
        assert home.newest_checkpoint() is None


@pytest.mark.parametrize(
    "state",
    [
        "{}",
        "[]",
        "[" * 100_000,
        '{"step": 9, "seconds": 1, "random": [{}]}',
        '{"step": 10, "seconds": 1, "random": []}',
        '{"step": 10, "seconds": 1, "random": {"python": 1}}',
        '{"step": 10, "seconds": "1", "random": [{}]}',
        '{"step": 10, "random": [{}]}',
    ],
)
def test_a_strange_state_with_its_checksum_is_passed_over(home, state):
    filled(home, 10)
    path = home.checkpoints / "step_00000010"
    (path / "state.json").write_text(state)
    sums = {"state.json": hashlib.sha256(state.encode()).hexdigest()}
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.warns(UserWarning, match="step_00000010 is passed over"):
        assert home.newest_checkpoint()[0] == 5


def test_new_checkpoints_outlive_useless_ones_of_later_steps(home):
    filled(home, 20)
    for step in (15, 20):
        flip_a_bit(home.checkpoints / f"step_{step:08d}")
    home.keep_metrics(0)
    for step in range(1, 11):
        home.append_metrics(record(step))
        if step % 5 == 0:
            home.save_checkpoint(step, write_state)
            assert home.newest_checkpoint()[0] == step
    kept = sorted(path.name for path in home.checkpoints.iterdir())
    assert kept == ["step_00000005", "step_00000010"]


def test_a_checkpoint_without_its_metrics_is_passed_over(home):
    filled(home, 10)
    home.keep_metrics(7)
    with pytest.warns(UserWarning, match="metrics.jsonl ends at step 7"):
        assert home.newest_checkpoint()[0] == 5


def test_a_checkpoint_has_its_name_only_when_the_disk_has_all_of_it(home, monkeypatch):
    events = []
    sync, rename = os.fsync, type(home.path).rename

    def noted_sync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def noted_rename(path, target):
        inodes = [file.stat().st_ino for file in (*path.iterdir(), path)]
        assert len(inodes) == 4 and set(inodes) <= set(events) and not target.exists()
        events.append("rename")
        return rename(path, target)

    home.write_json("run.json", {"run": {}})
    home.append_metrics(record(1))
    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(type(home.path), "rename", noted_rename)
    home.save_checkpoint(1, write_state)
    metrics, parent = (
        path.stat().st_ino for path in (home.path / "metrics.jsonl", home.checkpoints)
    )
    # The metrics are on the disk before the checkpoint that counts on them.
    assert metrics in events[: events.index("rename")]
    assert events[events.index("rename") + 1 :] == [parent]


def test_a_checkpoint_replaces_a_damaged_one_of_its_step(home):
    filled(home, 10)
    flip_a_bit(home.checkpoints / "step_00000010")
    home.save_checkpoint(10, write_state)
    assert home.newest_checkpoint()[0] == 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_earlier_checkpoint(home, number):
    filled(home, 5)

    def write(folder):
        write_state(folder)
        raise OSError(number, os.strerror(number))

    with pytest.raises(DiskFullError, match="the checkpoint of step 5 is intact") as caught:
        home.save_checkpoint(10, write)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in home.checkpoints.iterdir()] == ["step_00000005"]
    assert home.newest_checkpoint()[0] == 5


def test_a_full_disk_leaves_the_old_file(home, monkeypatch):
    home.write_json("environment.json", {"old": True})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="nothing is lost"):
        home.write_json("environment.json", {"old": False})
    assert home.read_json("environment.json") == {"old": True}
    assert len(list(home.path.iterdir())) == 1


def test_a_full_disk_that_a_library_tells_in_words(home):
    def write(folder):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(DiskFullError):
        home.save_checkpoint(1, write)


def test_other_failures_are_not_called_a_full_disk(home):
    def write(folder):
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        home.save_checkpoint(1, write)
    assert list(home.checkpoints.iterdir()) == []


def test_a_folder_is_used_by_one_at_a_time(home):
    with home.locked():
        with pytest.raises(FolderInUseError, match="another process"):
            with RunFolder(home.path).locked():
                pass
    with home.locked():
        pass


LOCK = """
import sys, time
from nomadam.runs import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("locked", flush=True)
    time.sleep(60)
"""


def stdlib_child(code, *arguments):
    """A process that imports nomadam.runs without torch, which takes seconds."""
    bare = (
        "import sys, types; from importlib.util import find_spec; "
        "package = types.ModuleType('nomadam'); "
        f"package.__path__ = [{os.path.dirname(sys.modules['nomadam'].__file__)!r}]; "
        "sys.modules['nomadam'] = package\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", bare + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_lock_dies_with_its_process(home):
    child = stdlib_child(LOCK, home.path)
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(FolderInUseError):
        with home.locked():
            pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with home.locked():
        pass


WRITE = """
import json, sys
from nomadam.runs import RunFolder
home = RunFolder(sys.argv[1])
def write(folder):
    state = {"step": int(folder.name.split("_")[1].split(".")[0]), "seconds": 1, "random": [{}]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "weights").write_bytes(bytes(300_000))
with home.locked():
    found = home.newest_checkpoint()
    begin = found[0] if found else 0
    home.keep_metrics(begin)
    print(begin, flush=True)
    for step in range(begin + 1, 100_000):
        more = {f"number {each}": each for each in range(30)}
        home.append_metrics({"step": step, "tokens": step, "seconds": step, **more})
        home.write_json("result.json", {"step": step, "text": "x" * 500})
        if step % 2 == 0:
            home.save_checkpoint(step, write)
"""


def test_kills_at_any_instant_leave_a_whole_folder(home):
    draw = random.Random(20260101)
    begun = [0]
    partial = 0
    for _ in range(25):
        child = stdlib_child("import warnings; warnings.simplefilter('error')\n" + WRITE, home.path)
        begun.append(int(child.stdout.readline()))
        time.sleep(draw.uniform(0.0, 0.08))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        partial += any(home.checkpoints.glob(".step_*"))
        if (home.path / "result.json").exists():
            assert home.read_json("result.json")["text"] == "x" * 500
    assert begun == sorted(begun) and begun[-1] > 0
    assert partial > 0, "no kill met a checkpoint being written"
    with home.locked():
        assert not list(home.checkpoints.glob(".*")) and not list(home.path.glob(".*.partial"))
