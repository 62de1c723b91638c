"""The text of each marked section, made from the results and from the shapes of models."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from goals import goals_table
from trainers_table import trainers_table

from nomadam.experiments.cost.models import on_meta
from nomadam.experiments.cost.sharding import LARGE_MODELS, STORAGES, bytes_held, update_bytes

Results = Mapping[tuple[str, str], Mapping[str, Any]]
DEVICES = ("cpu", "cuda")
LABELS = {
    "tiny": "tiny",
    "vit_s_16": "ViT-S/16",
    "gpt2_small": "GPT-2 small",
    "vit_h_14": "ViT-H/14",
    "gpt2_xl": "GPT-2 XL",
    "llama2_7b": "Llama-2-7B",
}
PAPER_LABELS = {
    "sgdm": "SGD with momentum",
    "adamw": "AdamW",
    "adam_mini": "Adam-mini",
    "prodigy": "Prodigy",
    "sgd_sai": "SGD-SaI",
}
README_ROWS = (
    "torch_sgd_fused",
    "torch_adamw_fused",
    "torch_adamw_foreach",
    "adam_mini",
    "lion",
    "prodigy",
    "muon",
    "torchao_adamw8bit",
    "bitsandbytes_adamw8bit",
    "released_sgd_sai",
    "pytorch_optimizer_sgd_sai",
    "sgd_sai_for_loop",
    "sgd_sai_fused",
    "sgd_sai_int8_momentum",
    "sgd_sai_bf16_int8",
)


def read_results(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The newest file of each kind and device, by both.

    Args:
        folder: of ``<what>_<device>_<yyyymm>.json``.
    """
    found = {}
    for path in sorted(folder.glob("*_*_*.json"), key=lambda path: path.stem.rpartition("_")[2]):
        what, device, _ = path.stem.rsplit("_", 2)
        found[what, device] = json.loads(path.read_text()) | {"file": path.name}
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; its first column is text, the others are numbers."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def milliseconds(value: float) -> str:
    """Three digits, whatever the size."""
    return number(value, 2 if value < 10 else 1 if value < 100 else 0)


def source(result: Mapping[str, Any]) -> str:
    """Where a table's numbers come from: machine, versions, date, file."""
    env = result["environment"]
    threads = f", torch threads: {env['threads']}" if env["device"] == "cpu" else ""
    return (
        f"{env['device_name']}{threads}, torch {env['torch']}, {result['date']}; "
        f"`benchmarks/results/{result['file']}`"
    )


def each_device(results: Results, what: str, text: Callable[[Mapping[str, Any]], str]) -> str:
    """A text for each device that has results, and a line for CUDA if it has none."""
    parts = [text(results[what, device]) for device in DEVICES if (what, device) in results]
    if (what, "cuda") not in results:
        parts.append("CUDA: not measured, for no GPU was at hand; `make bench` on one does.")
    return "\n\n".join(parts)


def step_time_rows(found: Mapping[str, Any], names: Sequence[str] | None = None) -> list[list[str]]:
    """A line for each optimizer, the fastest first; those of nomadam bold."""
    lines = []
    for row in sorted(found["rows"].values(), key=lambda row: row["step_ms"]["median"]):
        if names is not None and row["name"] not in names:
            continue
        ratio, share = row["ratio"], row["share_of_copy"]
        spread = f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})" if ratio else "–"
        lines.append(
            [
                f"**{row['label']}**" if row["label"].startswith("SGDSaI,") else row["label"],
                row["weights"],
                number(row["state_bytes_per_param"]),
                milliseconds(row["step_ms"]["median"]),
                "1" if row["name"] == "torch_sgd_fused" else spread,
                "–" if share is None else f"{share:.0%}",
            ]
        )
    return lines


def step_time_table(found: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """The table of one model."""
    heads = ["", "weights", "state, bytes a parameter", "step, ms", "/ torch SGD fused (quartiles)"]
    return table([*heads, "share of copy bandwidth"], step_time_rows(found, names))


def size_line(model: str, found: Mapping[str, Any]) -> str:
    """What was stepped."""
    return (
        f"{LABELS[model]}: {found['num_params'] / 1e6:,.1f} M parameters in "
        f"{found['num_tensors']} tensors"
    )


def performance(results: Results) -> str:
    """The README's table: GPT-2 small."""

    def text(result: Mapping[str, Any]) -> str:
        found = result["shapes"]["gpt2_small"]
        rounds = max(len(row["rounds_ms"]) for row in found["rows"].values())
        return (
            f"{step_time_table(found, README_ROWS)}\n\n"
            f"One optimizer step, {size_line('gpt2_small', found)}; medians over up to {rounds} "
            f"rounds in which each steps once, in turn; {source(result)}. `make bench` repeats it, "
            "`nomadam profile` measures your machine."
        )

    return each_device(results, "step_time", text)


def step_times(results: Results) -> str:
    """The tables of all models, with what was skipped and why."""

    def text(result: Mapping[str, Any]) -> str:
        parts = [f"On {source(result)}."]
        for model, found in result["shapes"].items():
            skipped = found["skipped"]
            parts.append(f"### {size_line(model, found)}")
            if copy := found["copy_gb_s"]:
                speed = f"{copy['median']:.1f} GB/s, read and written"
                parts[-1] += f"\n\nCopy bandwidth in the same run: {speed}."
            if found["rows"]:
                parts.append(step_time_table(found))
            parts += [skipped_line(skipped)] if skipped else []
        return "\n\n".join(parts)

    return each_device(results, "step_time", text)


def skipped_line(skipped: Mapping[str, str]) -> str:
    """Who was skipped, put together by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        kind = "does not fit in memory" if " GiB " in reason else reason.strip(".")
        reasons.setdefault(kind, []).append(f"`{name}`")
    return "Skipped: " + "; ".join(f"{', '.join(n)}: {kind}" for kind, n in reasons.items()) + "."


def first_step(results: Results) -> str:
    """The first step and measuring."""

    def text(result: Mapping[str, Any]) -> str:
        parts = []
        for model, found in result["shapes"].items():
            lines = []
            for row in found["rows"].values():
                measuring = row.get("measuring_ratio")
                lines.append(
                    [
                        row["label"],
                        milliseconds(row["first_step_ms"]["median"]),
                        f"{row['ratio']['median']:.2f}",
                        milliseconds(row["later_step_ms"]["median"]),
                        number(measuring and measuring["median"]),
                    ]
                )
            heads = [LABELS[model], "first step, ms", "/ torch SGD's first step"]
            parts.append(table([*heads, "later step, ms", "measuring / a later step"], lines))
        return "\n\n".join([*parts, f"{result['repeats']} repeats; {source(result)}."])

    return each_device(results, "first_step", text)


def cold_start(results: Results) -> str:
    """Seconds to the first step of a process."""

    def text(result: Mapping[str, Any]) -> str:
        lines = [
            [f"`{name}`", number(row["cold_s"]), number(row["warm_s"])]
            for name, row in result["rows"].items()
        ]
        heads = ["first step of a process", "nothing compiled yet, s", "compiled before, s"]
        return f"{table(heads, lines)}\n\nSmall tensors; {source(result)}."

    return each_device(results, "cold_start", text)


def memory(results: Results) -> str:
    """Bytes a parameter."""

    def text(result: Mapping[str, Any]) -> str:
        parts = []
        for model, found in result["shapes"].items():
            lines = []
            for row in found["rows"].values():
                total = row["weights"] + row["gradient"] + row["state"]
                cells = [number(row["state"], 3), number(total, 3)]
                cells += [number(row["extra_live"], 3), number(row["extra"], 3)]
                lines.append([row["label"], *cells])
            heads = [f"{LABELS[model]}, bytes a parameter", "state", "weights + gradient + state"]
            heads += ["extra in a step, tensors", "extra in a step, process"]
            parts.append(table(heads, lines))
            parts += [skipped_line(found["skipped"])] if found["skipped"] else []
        return "\n\n".join([*parts, f"{source(result)}."])

    return each_device(results, "memory", text)


def gradient_release(results: Results) -> str:
    """A training step's peak, with gradient release and without."""

    def text(result: Mapping[str, Any]) -> str:
        lines = []
        for name, row in result["rows"].items():
            cells = [row[key] for key in ("weights", "state", "extra_live", "extra")]
            lines.append([name, *map(number, cells), milliseconds(row["step_ms"])])
        shape = result["shape"]
        heads = ["bytes a parameter", "weights", "state", "peak beside them, tensors"]
        heads += ["peak beside them, process", "forward, backward and step, ms"]
        block = next(iter(result["rows"].values()))["largest_block"]
        return (
            f"{table(heads, lines)}\n\nGPT-2 of {shape['layers']} layers, width {shape['width']}, "
            f"one row of {shape['tokens']} tokens; its largest block is {block:.2f} bytes a "
            f"parameter in float32; {source(result)}."
        )

    return each_device(results, "gradient_release", text)


def paper(results: Results) -> str:
    """Our state, from shapes, beside the paper's; and our times where a GPU was measured."""
    result = results["memory", "cpu"] if ("memory", "cpu") in results else results["memory", "cuda"]
    states, published = result["state_bytes"], result["paper"]
    heads = ["state, GiB: ours / the paper's", *(LABELS[model] for model in states)]
    lines = []
    for name in next(iter(states.values())):
        cells = []
        for model in states:
            theirs = published[model].get(name)
            beside = f" / {theirs[0]:.2f}" if theirs else ""
            cells.append(f"{states[model][name] / 2**30:.2f}{beside}")
        lines.append([PAPER_LABELS.get(name, name.replace("sgd_sai", "SGD-SaI")), *cells])
    return f"{table(heads, lines)}\n\n{_paper_times(results, published)}"


def _paper_times(results: Results, published: Mapping[str, Any]) -> str:
    ours = {"sgdm": "torch_sgd_foreach", "adamw": "torch_adamw_foreach", "adam_mini": "adam_mini",
            "prodigy": "prodigy", "sgd_sai": "sgd_sai_foreach"}  # fmt: skip
    shapes = results.get(("step_time", "cuda"), {}).get("shapes", {})
    lines = []
    for name, label in PAPER_LABELS.items():
        cells = []
        for model, columns in published.items():
            row = shapes.get(model, {}).get("rows", {}).get(ours[name])
            theirs = columns[name][1]
            said = "out of memory" if theirs is None else f"{theirs:g}"
            cells.append(f"{milliseconds(row['step_ms']['median']) if row else '–'} / {said}")
        lines.append([label, *cells])
    heads = ["step, ms: ours / the paper's", *(LABELS[model] for model in published)]
    where = (
        f"Ours: foreach, {source(results['step_time', 'cuda'])}."
        if shapes
        else "Ours: not measured, for no GPU was at hand."
    )
    return f"{table(heads, lines)}\n\n{where}"


def growth(results: Results) -> str:
    """Where the compiled pass overtakes the others."""

    def text(result: Mapping[str, Any]) -> str:
        rows = result["studies"]["cross_over"]["rows"]
        names = list(dict.fromkeys(row["name"] for row in rows))
        labels = {row["name"]: row["label"] for row in rows}
        places: dict[tuple[int, int], dict[str, float]] = {}
        for row in rows:
            place = (row["num_tensors"], row["num_params"])
            places.setdefault(place, {})[row["name"]] = row["step_ms"]["median"]
        lines = [
            [f"{numel:,} in {count}", *(number(found.get(name), 3) for name in names)]
            for (count, numel), found in sorted(places.items())
        ]
        heads = ["parameters in tensors: step, ms", *(labels[name] for name in names)]
        return f"{table(heads, lines)}\n\n{source(result)}."

    return each_device(results, "scaling", text)


def sharded(results: Results) -> str:
    """What sharding costs: counted and predicted bytes, and the time beside plain tensors."""

    def text(result: Mapping[str, Any]) -> str:
        parts = []
        for shapes, found in result["shapes"].items():
            heads = ["processes, momentum", "step, ms", "held by the first, bytes", "predicted"]
            heads += ["received for gains, bytes", "predicted"]
            lines = [
                [
                    f"{row['world']}, {row['momentum']}",
                    milliseconds(row["step_ms"]["median"]),
                    f"{row['held_bytes']:,}",
                    f"{row['predicted_held_bytes']:,}",
                    f"{row['gain_bytes']:,}",
                    f"{row['predicted_gain_bytes']:,}",
                ]
                for row in found["rows"]
            ]
            ratios = "; ".join(
                f"{name}: {row['ratio']['median']:.2f} ({row['ratio']['q1']:.2f}–"
                f"{row['ratio']['q3']:.2f})"
                for name, row in found["overhead"].items()
            )
            parts.append(
                f"{table(heads, lines)}\n\nSharded tensors on one process take so many times "
                f"what plain ones take (median, quartiles): {ratios}. {size_line(shapes, found)}."
            )
        return "\n\n".join([*parts, f"The processes share the cores. {source(result)}."])

    return each_device(results, "sharded", text)


def memory_of_ranks(_: Results) -> str:
    """Memory of a rank under FSDP2 by the number of ranks, from the shapes."""
    worlds = (1, 8, 64, 512)
    lines = []
    for name, make in LARGE_MODELS.items():
        model = on_meta(make)
        for storage in STORAGES:
            sizes = [bytes_held(model, storage, world) / 2**30 for world in worlds]
            moved = number(update_bytes(1, storage), 1)
            lines.append([f"{name}, {storage.label}", *(number(x, 1) for x in sizes), moved])
    heads = ["GiB a rank, ranks:", *map(str, worlds), "an update moves, bytes a parameter"]
    return table(heads, lines)


def trainers(_: Results) -> str:
    """Which trainers were tested, in which versions."""
    return trainers_table()


def goals(results: Results) -> str:
    """What the release was to reach, and what was measured."""
    return goals_table(results, table)


SECTIONS: Mapping[str, Callable[[Results], str]] = MappingProxyType(
    {
        "performance": performance,
        "goals": goals,
        "step_times": step_times,
        "first_step": first_step,
        "cold_start": cold_start,
        "memory": memory,
        "gradient_release": gradient_release,
        "paper": paper,
        "growth": growth,
        "sharded": sharded,
        "memory_of_ranks": memory_of_ranks,
        "trainers": trainers,
    }
)
