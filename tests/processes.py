"""Runs the cases of a module in several processes that talk over gloo."""

import datetime
import importlib
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

LIMIT_SECONDS = 120


def run_cases(rank, size, folder, module):
    """All cases in one process of several; what they raised goes into files."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    limit = datetime.timedelta(seconds=LIMIT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    try:
        for case in importlib.import_module(module).cases(size):
            try:
                case()
                error = ""
            except Exception:
                error = traceback.format_exc()
            (Path(folder) / f"{case.__name__}.{rank}").write_text(error)
            dist.barrier()  # one that failed may have left the others waiting
    finally:
        dist.destroy_process_group()


def outcomes(module, size):
    """Case to what went wrong in any of so many processes; all cases run in one go."""
    names = [case.__name__ for case in importlib.import_module(module).cases(size)]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.start_processes(
            run_cases, (size, folder, module), nprocs=size, join=False, start_method="spawn"
        )
        crash = ""
        try:
            while not context.join(timeout=300):
                pass
        except Exception as error:
            crash = str(error)
        found = {}
        for name in names:
            parts = [Path(folder, f"{name}.{rank}") for rank in range(size)]
            texts = [part.read_text() if part.exists() else f"no end: {crash}" for part in parts]
            found[name] = "\n".join(filter(None, texts))
        return found


def _call(rank, size, folder, function, arguments):
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(Path(folder) / "store"), size)
        limit = datetime.timedelta(seconds=LIMIT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    try:
        function(*arguments)
    finally:
        if size > 1:
            dist.destroy_process_group()


def in_processes(size, function, *arguments):
    """Call a function in fresh processes; what one of them raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _call, (size, folder, function, arguments), nprocs=size, start_method="spawn"
        )
