"""What the compiled step was to reach, and what the results say of it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Results = Mapping[tuple[str, str], Mapping[str, Any]]
OWN = "sgd_sai_fused"


def in_the_same_rounds(found: Mapping[str, Any], name: str, other: str) -> float | None:
    """Median over the rounds of one optimizer's time over another's; None where one is missing."""
    rows = found["rows"]
    if name not in rows or other not in rows:
        return None
    pairs = zip(rows[name]["rounds_ms"], rows[other]["rounds_ms"], strict=False)
    return statistics.median(own / theirs for own, theirs in pairs)


def goals_table(
    results: Results, table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
) -> str:
    """A line for each goal: its limit, what was measured, whether that is within it."""
    lines = [
        [what, f"{sign} {limit:g}", *_verdict(measured, limit, sign)]
        for what, sign, limit, measured in [
            *_step_goals(results),
            *_first_step_goals(results),
            *_memory_goals(results),
        ]
    ]
    return table(["", "goal", "measured", ""], lines)


def _verdict(measured: float | None, limit: float, sign: str) -> list[str]:
    if measured is None:
        return ["not measured", ""]
    holds = measured <= limit if sign == "≤" else measured >= limit
    digits = 3 if limit < 0.1 or limit > 1.6 else 2
    return [f"{measured:.{digits}f}", "holds" if holds else "missed"]


Goal = tuple[str, str, float, float | None]


def _step_goals(results: Results) -> list[Goal]:
    cpu = results.get(("step_time", "cpu"), {}).get("shapes", {}).get("gpt2_small", {"rows": {}})
    cuda = results.get(("step_time", "cuda"), {}).get("shapes", {}).get("gpt2_xl", {"rows": {}})
    small = "CPU, GPT-2 small, float32, SGDSaI fused: step"
    large = "CUDA, GPT-2 XL, SGDSaI fused: "
    share = cuda["rows"].get(OWN, {}).get("share_of_copy")
    return [
        (f"{small} / torch SGD fused", "≤", 1.10, in_the_same_rounds(cpu, OWN, "torch_sgd_fused")),
        (f"{small} / `sgd-sai`", "≤", 0.50, in_the_same_rounds(cpu, OWN, "released_sgd_sai")),
        (f"{small} / torch AdamW fused", "≤", 0.95,
         in_the_same_rounds(cpu, OWN, "torch_adamw_fused")),
        (f"{large}float32, share of copy bandwidth", "≥", 0.85, share),
        (f"{large}float32, step / torch AdamW fused", "≤", 0.75,
         in_the_same_rounds(cuda, OWN, "torch_adamw_fused")),
        (f"{large}pure bf16 with int8 momentum, step / its float32 step", "≤", 0.60,
         in_the_same_rounds(cuda, "sgd_sai_bf16_int8", OWN)),
    ]  # fmt: skip


def _first_step_goals(results: Results) -> list[Goal]:
    rows = _rows(results, "first_step")
    own = rows.get(OWN, {})
    return [
        ("first step / torch SGD fused's own first step", "≤", 1.6, _median(own, "ratio")),
        ("measuring alone / a later step", "≤", 1.5, _median(own, "measuring_ratio")),
    ]


def _memory_goals(results: Results) -> list[Goal]:
    rows = _rows(results, "memory")

    def state(name: str) -> float | None:
        return rows[name]["state"] if name in rows else None

    own = rows.get(OWN, {})
    seen = [own.get(key) for key in ("extra_live", "extra") if own.get(key) is not None]
    extra = max(seen, default=None)
    whole = rows.get("sgd_sai_bf16_int8")
    release = results.get(("gradient_release", "cpu"), {}).get("rows", {})
    freed = release.get("bf16, int8 momentum, released")
    return [
        ("extra memory of a step / the weights", "≤", 0.01, None if extra is None else extra / 4),
        ("state, bytes a parameter: float32", "≤", 4.001, state(OWN)),
        ("state: bf16 momentum", "≤", 2.01, state("sgd_sai_bf16_momentum")),
        ("state: int8 momentum", "≤", 1.07, state("sgd_sai_int8_momentum")),
        ("weights + gradient + state: pure bf16 with int8", "≤", 5.1,
         whole and whole["weights"] + whole["gradient"] + whole["state"]),
        ("the same with gradient release, beside the largest gradient", "≤", 3.1,
         freed and freed["weights"] + freed["state"]),
    ]  # fmt: skip


def _rows(results: Results, what: str) -> Mapping[str, Any]:
    return results.get((what, "cpu"), {}).get("shapes", {}).get("gpt2_small", {}).get("rows", {})


def _median(row: Mapping[str, Any], key: str) -> float | None:
    return row[key]["median"] if key in row else None
