"""Time of one optimizer step on the tensors of known models, all optimizers in turn.

Run: ``python benchmarks/step_time.py [--shapes gpt2_small] [--device cuda] [--out FOLDER]``.
"""

from results_file import arguments, say, write

from nomadam.experiments.cost.contenders import choose
from nomadam.experiments.cost.models import MODELS, on_meta
from nomadam.experiments.cost.timing import LARGE, measure_steps
from nomadam.profile_command import device_of, numbers_line, show_step_times


def main() -> None:
    """Prints a table for each model, and with ``--out`` writes all of them as JSON."""
    parser = arguments(__doc__, shapes=[name for name in MODELS if name != "tiny"])
    parser.add_argument("--rounds", type=int, default=20, help="a third of it from 300 M on")
    parser.add_argument("--seconds", type=float, default=8.0, help="for one optimizer, about")
    args = parser.parse_args()
    found = {}
    for name in args.shapes:
        make = MODELS[name]
        rounds = args.rounds if on_meta(make).numel < LARGE else max(3, args.rounds // 3)
        say(f"== {name}")
        found[name] = measure_steps(
            make,
            choose(args.optimizers),
            device_of(args.device),
            rounds=rounds,
            seconds=args.seconds,
            tell=say,
        )
        print(f"{name}: {numbers_line(found[name])}")
        show_step_times(found[name])
    write("step_time", args, {"rounds": args.rounds, "shapes": found})


if __name__ == "__main__":
    main()
