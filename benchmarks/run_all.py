"""All benchmarks, each in a process of its own; the results go to benchmarks/results.

Run: ``make bench``, or ``python benchmarks/run_all.py [--device cuda] [--quick]``. Then ``make
tables`` writes the tables and pictures of README.md and the documentation from the results.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "step_time.py",
    "first_step.py",
    "memory.py",
    "gradient_release.py",
    "scaling.py",
    "cold_start.py",
    "sharded.py",
)
SMALL_GPT2 = ["--layers", "1", "--width", "64", "--vocabulary", "512", "--tokens", "16"]
QUICK = {
    "step_time.py": ["--shapes", "tiny", "--rounds", "3"],
    "first_step.py": ["--shapes", "tiny", "--repeats", "2"],
    "memory.py": ["--shapes", "tiny"],
    "gradient_release.py": [*SMALL_GPT2, "--steps", "1"],
    "scaling.py": ["--largest", "1e6", "--rounds", "3"],
    "sharded.py": ["--shapes", "tiny", "--rounds", "2"],
    "cold_start.py": ["--repeats", "1", "--optimizers", "torch_sgd_fused", "sgd_sai_fused"],
}


def main() -> None:
    """Runs the scripts one after another; a failure is told, and the others still run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="cpu or cuda; default the best there is")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it all runs")
    args = parser.parse_args()
    if args.quick and args.out == HERE / "results":
        parser.error("--quick measures nothing to keep: give it another --out")
    failed = []
    for script in SCRIPTS:
        start = time.perf_counter()
        print(f"\n==== {script}", flush=True)
        command = [sys.executable, str(HERE / script), "--device", args.device]
        command += ["--out", str(args.out), *(QUICK[script] if args.quick else [])]
        if subprocess.run(command).returncode:
            failed.append(script)
        print(f"==== {script}: {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
