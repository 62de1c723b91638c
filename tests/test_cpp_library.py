"""The cache of compiled libraries: who shares it, what is damaged in it, what happens without."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nomadam.numerics import cpp_library
from nomadam.numerics.cpp_library import COMPILERS, NoCompilerError, load_cpp

REAL = next((path for path in map(shutil.which, COMPILERS) if path), None)
pytestmark = pytest.mark.skipif(
    REAL is None or sys.platform == "win32", reason="needs a C++ compiler and a POSIX shell"
)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "of a user" / "compiled"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Puts a shell script in the place of the compiler; returns what it was asked to make."""

    def install(script='exec {real} "$@"'):
        path = tmp_path / "bin" / "c++"
        path.parent.mkdir(exist_ok=True)
        log = tmp_path / "compiled.log"
        lines = f'case "$*" in *"-o "*) echo "$*" >> "{log}";; esac\n'
        path.write_text(f"#!/bin/sh\n{lines}{script.format(real=REAL)}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(cpp_library, "COMPILERS", ("c++",))
        return lambda: log.read_text().splitlines() if log.exists() else []

    return install


# Of a process of its own: in this one a library that was loaded stays so under its name.
SCRIPT = """
import sys
from pathlib import Path
from nomadam.numerics.cpp_library import load_cpp
print(load_cpp(Path(sys.argv[1]), Path(sys.argv[2])).answer())
"""


def started(source, folder):
    where = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, str(source), str(folder)]
    return subprocess.Popen(command, env=where, stdout=subprocess.PIPE, text=True)


def answers(source, folder):
    process = started(source, folder)
    return process.communicate(timeout=60)[0].strip()


def kept_in(folder):
    return sorted(folder.iterdir())


def test_the_next_process_does_not_compile(source, folder, compiler):
    made = compiler()
    assert answers(source, folder) == "42"
    assert answers(source, folder) == "42"
    assert len(made()) == 1 and len(kept_in(folder)) == 1


def test_another_source_or_other_flags_make_a_library_of_their_own(
    source, folder, compiler, monkeypatch
):
    made = compiler()
    assert load_cpp(source, folder).answer() == 42
    source.write_text(source.read_text().replace("42", "43"))
    assert load_cpp(source, folder).answer() == 43
    monkeypatch.setattr(cpp_library, "FLAGS", [*cpp_library.FLAGS, "-DOTHER"])
    assert load_cpp(source, folder).answer() == 43
    assert len(made()) == 3


@pytest.mark.parametrize("damage", ["cut", "emptied", "altered"])
def test_a_damaged_library_is_made_again(source, folder, compiler, damage):
    made = compiler()
    assert answers(source, folder) == "42"
    (kept,) = kept_in(folder)
    content = kept.read_bytes()
    harmed = {
        "cut": content[: len(content) // 2],
        "emptied": b"",
        "altered": content[:5000] + b"\xff" + content[5001:],
    }
    kept.write_bytes(harmed[damage])
    assert answers(source, folder) == "42"
    assert len(made()) == 2 and [path.read_bytes() for path in kept_in(folder)] == [content]


def test_processes_at_once_end_with_one_library(source, folder):
    processes = [started(source, folder) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["42\n"] * 4
    assert len(kept_in(folder)) == 1


def test_a_folder_that_cannot_be_written_does_no_harm(source, tmp_path):
    (tmp_path / "file").touch()
    assert load_cpp(source, tmp_path / "file" / "compiled").answer() == 42


def test_a_user_without_a_home_has_no_cache(source, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cpp_library.Path, "home", no_home)
    assert load_cpp(source).answer() == 42


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_does_no_harm(source, folder, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert load_cpp(source, folder).answer() == 42
    assert kept_in(folder) == []


def test_a_library_that_loads_only_elsewhere_is_not_fatal(source, folder, monkeypatch):
    load = ctypes.CDLL

    def not_from_the_cache(name):
        if name.startswith(str(folder)):
            raise OSError("failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", not_from_the_cache)
    assert load_cpp(source, folder).answer() == 42


def test_a_killed_compile_leaves_nothing_behind(source, folder, compiler):
    made = compiler('case "$*" in *-shared*) kill -9 $$;; esac; exec {real} "$@"')
    with pytest.raises(NoCompilerError, match="SIGKILL"):
        load_cpp(source, folder)
    assert not folder.exists() and len(made()) == len(cpp_library.TARGETS)


def test_a_target_that_the_compiler_does_not_know_is_left_out(source, folder, compiler):
    compiler('case "$*" in *native*) echo unknown target >&2; exit 1;; esac; exec {real} "$@"')
    assert load_cpp(source, folder).answer() == 42


def test_what_the_compiler_says_is_told(source, folder, compiler):
    compiler("echo no headers here >&2; exit 1")
    with pytest.raises(NoCompilerError, match=r"c\+\+ .*no headers here"):
        load_cpp(source, folder)


def test_no_compiler_is_told(source, folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoCompilerError, match=r"none of c\+\+, g\+\+, clang\+\+ was found"):
        load_cpp(source, folder)
