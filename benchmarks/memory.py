"""Memory of each optimizer in bytes a parameter, and the state of the paper's four models.

``extra`` is what a step takes beside weights, gradients and state: as the operators' tensors, and
as the peak of the process (on CUDA: of the allocator). The process's peak on a CPU contains a few
MB of the allocator's own. Run:
``python benchmarks/memory.py [--shapes gpt2_small] [--device cuda] [--out FOLDER]``.
"""

from results_file import arguments, say, write

from nomadam.experiments.cost.contenders import CONTENDERS
from nomadam.experiments.cost.memory import measure_memory
from nomadam.experiments.cost.models import LABELS, MODELS
from nomadam.experiments.cost.published import PAPER, state_table
from nomadam.profile_command import device_of
from nomadam.terminal import show_table


def main() -> None:
    """Prints a table for each model, and with ``--out`` writes all of them as JSON."""
    args = arguments(__doc__, shapes=["gpt2_small"]).parse_args()
    contenders = [CONTENDERS[name] for name in args.optimizers or CONTENDERS]
    found = {}
    for name in args.shapes:
        found[name] = measure_memory(MODELS[name], contenders, device_of(args.device), tell=say)
        lines = []
        for row in found[name]["rows"].values():
            total = row["weights"] + row["gradient"] + row["state"]
            extra = ["-" if row[k] is None else f"{row[k]:.3f}" for k in ("extra_live", "extra")]
            lines.append([row["label"], f"{row['state']:.3f}", f"{total:.3f}", *extra])
        heads = [f"{name}, bytes a parameter", "state", "weights +\ngradient + state"]
        show_table([*heads, "extra in a step,\ntensors", "extra in a step,\nprocess"], lines)
        for skipped, reason in found[name]["skipped"].items():
            print(f"skipped {skipped}: {reason}")
    states = state_table()
    names = list(states["vit_s_16"])
    lines = [[n, *(f"{states[model][n] / 2**30:.2f}" for model in PAPER)] for n in names]
    show_table(["state in GiB", *(LABELS[model] for model in PAPER)], lines)
    write("memory", args, {"shapes": found, "state_bytes": states, "paper": PAPER})


if __name__ == "__main__":
    main()
