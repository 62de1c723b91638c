"""Seconds until the first step of a fresh process is done: caches empty, and as it left them.

Run: ``python benchmarks/cold_start.py [--device cuda] [--out FOLDER]``.
"""

from results_file import arguments, write

from nomadam.experiments.cost.cold_start import measure_cold_start
from nomadam.profile_command import device_of
from nomadam.terminal import show_table

MEASURED = ("torch_sgd_fused", "sgd_sai_foreach", "sgd_sai_fused", "sgd_sai_bf16_int8",
            "torchao_adamw8bit")  # fmt: skip


def main() -> None:
    """Prints a table, and with ``--out`` writes it as JSON."""
    parser = arguments(__doc__, shapes=["tiny"])
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    names = args.optimizers or MEASURED
    device = device_of(args.device).type
    found = measure_cold_start(names, device, model=args.shapes[0], repeats=args.repeats)
    lines = [
        [name, f"{row['cold_s']:.2f}", f"{row['warm_s']:.2f}", f"{row['later_ms']:.2f}"]
        for name, row in found["rows"].items()
    ]
    show_table(["first step", "empty\ncaches, s", "filled\ncaches, s", "later\nstep, ms"], lines)
    for skipped, reason in found["skipped"].items():
        print(f"skipped {skipped}: {reason}")
    write("cold_start", args, found)


if __name__ == "__main__":
    main()
