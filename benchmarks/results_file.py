"""What every benchmark shares: its common arguments, and the file that its result is written to."""

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nomadam.experiments.cost.contenders import CONTENDERS
from nomadam.experiments.cost.models import MODELS
from nomadam.experiments.resources import environment
from nomadam.profile_command import device_of

PACKAGES = ("sgd-sai", "pytorch_optimizer", "prodigyopt", "torchao", "bitsandbytes", "flashoptim")


def arguments(description: str, *, shapes: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take.

    Args:
        description: of the benchmark, a file's docstring.
        shapes: the models that it measures where none are named.
    """
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=kind)
    parser.add_argument("--device", default="auto", help="cpu or cuda; default the best there is")
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=list(shapes))
    parser.add_argument("--optimizers", nargs="+", choices=list(CONTENDERS), default=None)
    parser.add_argument("--out", type=Path, help="folder to write the JSON to; default none")
    return parser


def say(line: str) -> None:
    """Writes a line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def write(what: str, args: argparse.Namespace, content: Mapping[str, Any]) -> Path | None:
    """Writes ``<what>_<device>_<yyyymm>.json`` into the folder that was asked for.

    Args:
        what: was measured.
        args: of the command.
        content: what was found.

    Returns:
        The file, None where no folder was asked for.
    """
    if args.out is None:
        return None
    now = datetime.now(UTC)
    device = device_of(args.device)
    record = {
        "what": what,
        "date": now.date().isoformat(),
        "environment": environment(device) | {"packages": versions()},
        **content,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{what}_{device.type}_{now:%Y%m}.json"
    text = json.dumps(rounded(record), indent=1, allow_nan=False)
    # A list of numbers is one line.
    text = re.sub(r"\[[-\s\d.e,+]+\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n")
    say(f"written to {path}")
    return path


def versions() -> dict[str, str | None]:
    """The versions of the packages that rivals come from, None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def rounded(value: Any) -> Any:
    """The same with floats to five digits, which is more than a clock tells."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
