"""The first step, which makes the state and measures the gains, and measuring by itself.

Run: ``python benchmarks/first_step.py [--shapes gpt2_small] [--device cuda] [--out FOLDER]``.
"""

from results_file import arguments, say, write

from nomadam.experiments.cost.contenders import choose
from nomadam.experiments.cost.first_step import measure_first_steps
from nomadam.experiments.cost.models import MODELS
from nomadam.profile_command import device_of
from nomadam.terminal import show_table

MEASURED = (
    "torch_adamw_fused",
    "released_sgd_sai",
    "sgd_sai_for_loop",
    "sgd_sai_foreach",
    "sgd_sai_fused",
    "sgd_sai_int8_momentum",
    "sgd_sai_bf16_int8",
)


def main() -> None:
    """Prints a table for each model, and with ``--out`` writes all of them as JSON."""
    parser = arguments(__doc__, shapes=["gpt2_small"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device, found = device_of(args.device), {}
    for name in args.shapes:
        found[name] = measure_first_steps(
            MODELS[name],
            choose(args.optimizers or MEASURED),
            device,
            repeats=args.repeats,
            tell=say,
        )
        heads = [name, "first step\nms", "/ torch SGD's\nfirst step", "later step\nms"]
        heads += ["measuring beyond\na later step, / it"]
        lines = []
        for row in found[name]["rows"].values():
            numbers = [row[key]["median"] for key in ("first_step_ms", "ratio", "later_step_ms")]
            measuring = row["measuring_ratio"]["median"] if "measuring_ratio" in row else None
            cells = [f"{numbers[0]:.1f}", f"{numbers[1]:.2f}", f"{numbers[2]:.1f}"]
            lines.append([row["label"], *cells, "-" if measuring is None else f"{measuring:.2f}"])
        if lines:
            show_table(heads, lines)
        for skipped, reason in found[name]["skipped"].items():
            print(f"skipped {skipped}: {reason}")
    write("first_step", args, {"repeats": args.repeats, "shapes": found})


if __name__ == "__main__":
    main()
