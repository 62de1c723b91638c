"""What the first step of a fresh process waits for: nothing compiled yet, or compiled before."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Where torch, Triton and nomadam keep what they compiled.
CACHES = (
    "HOME",
    "XDG_CACHE_HOME",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
)
PROGRAM = """
import json, sys, time
import torch
from nomadam.experiments.cost.contenders import choose
from nomadam.experiments.cost.models import MODELS, in_memory
from nomadam.experiments.cost.timing import quiet, step_ms

name, model, device = sys.argv[1], sys.argv[2], torch.device(sys.argv[3])
contender = choose([name])[-1]
module = in_memory(MODELS[model], device, contender.weights)
start = time.perf_counter()
with quiet():
    optimizer = contender.make(module)
made = 1e3 * (time.perf_counter() - start)
times = [step_ms(optimizer, device) for _ in range(4)]
print(json.dumps({"first_ms": made + times[0], "later_ms": sorted(times[1:])[1]}))
"""


def measure_cold_start(
    names: Sequence[str], device: str, *, model: str = "tiny", repeats: int = 3
) -> dict[str, Any]:
    """Seconds until an optimizer's first step is done, in processes of their own.

    Importing torch and making the tensors do not count.

    Args:
        names: of contenders.
        device: ``cpu`` or ``cuda``.
        model: whose tensors; small ones, so that the step itself does not count either.
        repeats: pairs of processes, the first with empty caches, the second with what it left.

    Returns:
        ``rows`` by name: ``cold_s`` and ``warm_s``, medians, and ``later_ms``; ``skipped``:
        reason by name.
    """
    rows: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in names:
        found: dict[str, list[float]] = {"cold_s": [], "warm_s": [], "later_ms": []}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="nomadam-") as folder:
                for key in ("cold_s", "warm_s"):
                    try:
                        record = _in_a_process(name, model, device, Path(folder))
                    except RuntimeError as error:
                        skipped[name] = str(error)
                        break
                    found[key].append(record["first_ms"] / 1e3)
                    found["later_ms"].append(record["later_ms"])
            if name in skipped:
                break
        else:
            rows[name] = {key: statistics.median(values) for key, values in found.items()}
    return {"model": model, "repeats": repeats, "rows": rows, "skipped": skipped}


def _in_a_process(name: str, model: str, device: str, folder: Path) -> dict[str, float]:
    caches = {variable: str(folder / variable.lower()) for variable in CACHES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, model, device],
        env={**os.environ, **caches},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])
