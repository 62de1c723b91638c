"""The command `nomadam profile`: what a step of each optimizer takes on this machine."""

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from nomadam import terminal

EPILOG = """\b
Examples:
  nomadam profile
  nomadam profile --shapes vit_s_16 --optimizer sgd_sai_fused --optimizer lion
  nomadam profile --shapes gpt2_xl --device cuda

"""
# Those that need no package beyond torch, and no minutes.
USUAL = (
    "torch_adamw_fused",
    "torch_adamw_foreach",
    "torch_sgd_foreach",
    "sgd_sai_for_loop",
    "sgd_sai_foreach",
    "sgd_sai_fused",
    "sgd_sai_int8_momentum",
    "sgd_sai_bf16_int8",
)


def profile(
    shapes: Annotated[
        str,
        typer.Option(
            "--shapes",
            metavar="NAME",
            help="Whose tensors: tiny, vit_s_16, gpt2_small, vit_h_14, gpt2_xl or llama2_7b.",
        ),
    ] = "gpt2_small",
    optimizers: Annotated[
        list[str] | None,
        typer.Option(
            "--optimizer",
            metavar="NAME",
            help="What to measure beside torch's fused SGD, or `all`; repeatable.  "
            "[default: torch's and SGDSaI's]",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda", help="Where; default the best there is.")
    ] = "auto",
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", help="Steps of each, in turn.", min=1)
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error.")
    ] = False,
) -> int:
    """Measure optimizer steps on the tensors of a known model, in turn, on this machine.

    No model is run: the tensors have its shapes, and the gradients are random. What does not fit
    in memory, or can not run here, is skipped by name.
    """
    from nomadam.experiments.cost.contenders import choose
    from nomadam.experiments.cost.models import MODELS
    from nomadam.experiments.cost.timing import measure_steps
    from nomadam.experiments.resources import environment

    if shapes not in MODELS:
        raise ValueError(f"--shapes {shapes!r} is not known; there are {', '.join(MODELS)}")
    where = device_of(device)
    chosen = choose(None if optimizers == ["all"] else optimizers or USUAL)
    # Standard output is the result's; what packages print when they are imported is not.
    with contextlib.redirect_stdout(None):
        found = measure_steps(MODELS[shapes], chosen, where, rounds=rounds, tell=terminal.say)
    if as_json:
        terminal.show_json({"shapes": shapes, "environment": environment(where), **found})
    else:
        name = environment(where)["device_name"]
        terminal.show(f"{shapes} on {name}: {numbers_line(found)}")
        show_step_times(found)
    return 0


def device_of(name: str) -> Any:
    """Turns ``auto``, ``cpu`` or ``cuda`` into a torch device.

    Raises:
        ValueError: another name, or CUDA where there is none.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    has_cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if has_cuda else "cpu")


def numbers_line(found: Mapping[str, Any]) -> str:
    """The size of what was measured, and the copy bandwidth, in a line."""
    copy = found["copy_gb_s"]
    speed = f", copy {copy['median']:.1f} GB/s (read and written)" if copy else ""
    return f"{found['num_params']:,} parameters in {found['num_tensors']:,} tensors{speed}"


def show_step_times(found: Mapping[str, Any]) -> None:
    """Print what `measure_steps` found: a line each, the fastest first, then the skipped."""
    heads = ["optimizer", "weights", "state\nB/param", "step ms", "/ torch SGD\nfused"]
    heads += ["quartiles", "share of\ncopy"]
    lines = []
    for row in sorted(found["rows"].values(), key=lambda row: row["step_ms"]["median"]):
        ratio, share = row["ratio"], row["share_of_copy"]
        ratios = [f"{ratio['median']:.2f}", f"{ratio['q1']:.2f}-{ratio['q3']:.2f}"] if ratio else []
        lines.append(
            [
                row["label"],
                row["weights"],
                f"{row['state_bytes_per_param']:.2f}",
                f"{row['step_ms']['median']:.2f}",
                *(ratios or [terminal.NONE] * 2),
                terminal.NONE if share is None else f"{share:.0%}",
            ]
        )
    if lines:
        terminal.show_table(heads, lines)
    for name, reason in found["skipped"].items():
        terminal.show(f"skipped {name}: {reason}")
