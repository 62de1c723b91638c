"""How the time of a step grows with parameters and with tensors, and where one path passes another.

Three studies on equal matrices: 1 M to 1 B parameters in 100 tensors; 10 M parameters in 10 to
10,000 tensors; and the cross-over, 100 k to 30 M parameters in 10 and in 150 tensors.
Run: ``python benchmarks/scaling.py [--largest 1e9] [--device cuda] [--out FOLDER]``.
"""

from results_file import arguments, say, write

from nomadam.experiments.cost.contenders import choose
from nomadam.experiments.cost.scaling import measure_growth
from nomadam.profile_command import device_of
from nomadam.terminal import show_table

MEASURED = ("torch_adamw_fused", "sgd_sai_for_loop", "sgd_sai_foreach", "sgd_sai_fused")
PARAMETERS = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
TENSORS = (10, 100, 1000, 10_000)
CROSS_OVER = (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7)


def main() -> None:
    """Prints a table for each study, and with ``--out`` writes all of them as JSON."""
    parser = arguments(__doc__, shapes=["tiny"])
    parser.add_argument("--largest", type=float, default=1e9, help="parameters; default 1e9")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    studies = {
        "parameters": [(numel, 100) for numel in PARAMETERS],
        "tensors": [(10**7, count) for count in TENSORS],
        "cross_over": [(numel, count) for count in (10, 150) for numel in CROSS_OVER],
    }
    contenders = choose(args.optimizers or MEASURED)
    found = {}
    for name, sizes in studies.items():
        kept = [size for size in sizes if size[0] <= args.largest]
        found[name] = measure_growth(
            kept, contenders, device_of(args.device), rounds=args.rounds, tell=say
        )
        times = {
            (row["num_params"], row["num_tensors"], row["name"]): row["step_ms"]["median"]
            for row in found[name]["rows"]
        }
        places = dict.fromkeys(key[:2] for key in times)
        lines = []
        for place in places:
            cells = [times.get((*place, each.name)) for each in contenders]
            lines.append(
                [
                    f"{place[0]:,} in {place[1]:,}",
                    *("-" if c is None else f"{c:.3f}" for c in cells),
                ]
            )
        show_table(
            [f"{name}: ms", *(each.name.replace("_", "\n", 1) for each in contenders)], lines
        )
        for skipped, reason in found[name]["skipped"].items():
            print(f"skipped {skipped}: {reason}")
    write("scaling", args, {"rounds": args.rounds, "studies": found})


if __name__ == "__main__":
    main()
