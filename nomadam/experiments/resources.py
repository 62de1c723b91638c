"""What a training uses and runs on: memory, optimizer state, device, versions."""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import nomadam
from nomadam.experiments import processes

MEGABYTE = 1e6
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "safetensors")


def device_named(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: ``cpu``, ``cuda``, ``mps``, or ``auto``: CUDA, else MPS, else the CPU.

    Raises:
        ValueError: for another name, and a device that this machine does not have.

    Example:
        >>> device_named("cpu")
        device(type='cpu')
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    have = [kind for kind in there if there[kind]]
    if name not in ("auto", *have):
        raise ValueError(f"device = {name!r}: must be auto or one of {', '.join(have)}")
    return torch.device(have[0] if name == "auto" else name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_mb(device: torch.device) -> float | None:
    """Memory in use now in MB (10^6 bytes): of tensors on a GPU, resident in the process on a CPU.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MEGABYTE
    if device.type == "mps":
        return torch.mps.current_allocated_memory() / MEGABYTE
    return _process_status("VmRSS") or peak_memory_mb(device)


def peak_memory_mb(device: torch.device) -> float | None:
    """Largest memory in MB (10^6 bytes) since `reset_peak_memory`, as `memory_mb` counts it.

    On a CPU whose system can not reset it, since the process started; on MPS, which keeps no
    peak, what is in use now. None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEGABYTE
    if device.type == "mps":
        return memory_mb(device)
    if (status := _process_status("VmHWM")) is not None:
        return status
    try:
        import resource
    except ImportError:
        return None
    # Kilobytes, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


def reset_peak_memory(device: torch.device) -> None:
    """Begin the peak anew, where the device or the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        try:
            # Linux: resets VmHWM of this process.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def _process_status(field: str) -> float | None:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024 / MEGABYTE
    except OSError:
        pass
    return None


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in ``optimizer.state``, nested ones too.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(10))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer_state_bytes(optimizer)
        40
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _nested(optimizer.state))


def _nested(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _nested(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nested(item)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads, processes, code and command of a training, for its folder."""
    commit, dirty = _git_state()
    names = {"cuda": torch.cuda.get_device_name, "mps": lambda _: "Apple MPS"}
    name = names.get(device.type, lambda _: _processor())(device)
    return {
        "python": platform.python_version(),
        "nomadam": nomadam.__version__,
        **{package: _version(package) for package in PACKAGES},
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "platform": platform.platform(),
        "git_commit": commit,
        "git_dirty": dirty,
        "command": [_program(Path(sys.argv[0])), *sys.argv[1:]],
    }


def _program(path: Path) -> str:
    # ``python -m nomadam`` is the same command.
    return path.parent.name if path.name == "__main__.py" else path.name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_state() -> tuple[str | None, bool | None]:
    """Commit of the tree that this package lies in, and whether the package was changed since."""
    here = Path(__file__).resolve()
    # An installed copy may lie inside a repository of something else.
    if _git("ls-files", "--error-unmatch", here.name) is None:
        return None, None
    # Only the package: the run folders themselves are new files of the tree.
    status = _git("status", "--porcelain", "--", "..")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
