"""The claims as tables in Markdown, from the JSON that holds what was found."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nomadam.reports.tables import fixed, markdown_table

HEADINGS = {
    "claim": "The paper's claims",
    "question": "What the paper leaves open, as hypotheses",
}
# What some settings have beside the loss: its head, factor and digits.
BESIDE = {
    "validation_cross_entropy": ("cross entropy", 1, 4),
    "validation_accuracy": ("top-1, %", 100, 1),
}
MARKERS = re.compile(r"<!-- begin claims -->\n.*?<!-- end claims -->", re.DOTALL)


def claims_page(found: Mapping[str, Any]) -> str:
    """All tables under their headings, in Markdown.

    Args:
        found: ``claims``, ``arms``, ``rates`` and ``budget``, as `nomadam.experiments.claims`
            makes them.
    """
    parts = []
    for kind, heading in HEADINGS.items():
        rows = [row for row in found["claims"] if row["kind"] == kind]
        parts += [f"### {heading}", _tally(rows), _claims_table(rows)]
    parts += ["### What they are worth", _limits()]
    parts += ["### The arms", _arms_text(found["budget"]), _left_out(found)]
    for setting, arms in found["arms"].items():
        parts += [f"`{setting}`:", _arms_table(arms)]
    if found["rates"]:
        parts += ["### The learning rates", _rates_text(), _rates_table(found["rates"])]
    parts += ["### The budget", _budget_text(found["budget"]), _budget_table(found["budget"])]
    return "\n\n".join(part for part in parts if part)


def with_claims(text: str, found: Mapping[str, Any]) -> str:
    """A page with its marked part made anew, all else left alone.

    Args:
        text: of the page; the part stands between ``<!-- begin claims -->`` and its end.
        found: as `claims_page` takes it.

    Raises:
        ValueError: the page has no such part.
    """
    check_markers(text)
    section = f"<!-- begin claims -->\n{claims_page(found)}\n<!-- end claims -->"
    # A function, since backslashes in the text are no groups.
    return MARKERS.sub(lambda _: section, text)


def check_markers(text: str) -> None:
    """Refuse a page that has no part for the claims.

    Raises:
        ValueError: saying how it is marked.
    """
    if not MARKERS.search(text):
        raise ValueError(
            "the page has no part between <!-- begin claims --> and <!-- end claims -->"
        )


def _tally(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = {
        verdict: sum(row["verdict"] == verdict for row in rows)
        for verdict in ("held", "not held", "undecided")
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{len(rows)} rows: {told}."


def _claims_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ["statement", "protocol", "in the paper", "here", "n", "verdict"]
    cells = [
        [
            row["statement"],
            row["protocol"],
            row["paper"],
            row["ours"],
            str(row["n"]),
            row["verdict"],
        ]
        for row in rows
    ]
    return markdown_table(heads, cells, left=(0, 1, 2, 3, 5))


def _limits() -> str:
    return (
        "Small models and short trainings on two cores. The intervals are over seeds: not over "
        "tunings, nor texts or images, nor a correction for the number of rows. Few trials, at "
        "the same points of every arm's ranges: where an arm is best between them it looks worse "
        "than it is. On ResNet-18 nine trials, which are not kept, had missed SGD-SaI's best by "
        "14 % of the loss, so it has 25 in wider ranges for all; but for gpt2_long and two arms "
        "of diffusion others have not been searched twice. AdamW's betas were not searched. Rates "
        "and decays are chosen on the held-out data that decides, on GPT-2 on the first files of "
        "it. LoRA starts from one first stage for all seeds. Held-out digits are of the same "
        "hands as those trained on; top-1 is near its ceiling on them: one point is 6 images. The "
        "grids tell widths to a step of 0.60 decades, and end where the paper's do not. A "
        "training whose final loss is above that of knowing nothing counts as diverged. An arm "
        "with three fields to search had no more trials than one with one. The English is the "
        "prose within the other text. That the gains of matrices are constant is nearly "
        "arithmetic: a gain is √(N − 1) wherever the mean of the N entries is small beside their "
        "spread; drift is that of single batches, noise and all."
    )


def _arms_text(budget: Mapping[str, Any]) -> str:
    tuned = next(row for row in budget["rows"] if row["trials"])
    return (
        f"Each arm was tuned in {tuned['trials']} trainings, or as many as stand below: trials "
        "with one seed, seven tenths of them quasi-random in the ranges that its row of the table "
        "of optimizers declares (or what the form below says), the rest around the best; and the "
        "best three again with another seed. The best mean was "
        f"taken. It was then trained with {tuned['seeds']} other seeds, whose mean stands here. "
        "*To AdamW* is the mean of the paired differences in per cent of AdamW's loss, with its "
        "95 % interval. An arrow stands at a best value beyond which nothing was tried. Where "
        "*cross entropy* stands, the loss is with label smoothing of 0.1 in ten classes, and can "
        "not fall below 0.500: per cents of it are small."
    )


def _left_out(found: Mapping[str, Any]) -> str:
    told = "; ".join(f"{arms}: {why}" for arms, why in found["left_out"].items())
    return f"Left out: {told}."


def _arms_table(arms: Sequence[Mapping[str, Any]]) -> str:
    known = [key for key in BESIDE if any(arm.get(key) is not None for arm in arms)]
    heads = ["optimizer", "best values", "validation loss"]
    heads += [BESIDE[key][0] for key in known] + ["to AdamW, %", "bytes/param", "diverged"]
    cells = []
    for arm in arms:
        row = [arm["optimizer"], _values(arm), fixed(arm["validation_loss"], 4)]
        for key in known:
            _, factor, digits = BESIDE[key]
            value = arm.get(key)
            row.append(fixed(value and factor * value, digits))
        row += [_against(arm), fixed(arm["state_bytes_per_param"], 2), _diverged(arm)]
        cells.append(row)
    return markdown_table(heads, cells, left=(0, 1))


def _values(arm: Mapping[str, Any]) -> str:
    if arm["at_the_values_of"]:
        return f"those of {arm['at_the_values_of']}"
    arrows = {"lower": "↓", "upper": "↑"}
    told = [
        f"{name} {value:.3g}{arrows.get(arm['edges'].get(name), '')}"
        if isinstance(value, float)
        else f"{name} {value}"
        for name, value in (arm["values"] or {}).items()
    ]
    return ", ".join(told) or "–"


def _against(arm: Mapping[str, Any]) -> str:
    if arm["optimizer"] == "adamw" or arm["to_adamw_percent"] is None:
        return "–"
    mean, low, high = arm["to_adamw_percent"]
    if low is None or high is None:
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _diverged(arm: Mapping[str, Any]) -> str:
    seeds = f"{arm['seeds_diverged']} of {arm['seeds']}"
    if arm["at_the_values_of"]:
        return seeds
    return f"{arm['trials_diverged']} of {arm['trials']} trials, {seeds}"


def _rates_text() -> str:
    return (
        "A step of AdamW moves a block of N elements by about lr · √N, one of SGD-SaI by lr · √N "
        "times the norm of the block's gradient. If B blocks share the norm G of the whole one "
        "alike, equal steps need rates in the ratio √B / G. G is the median over the steps of "
        "SGD-SaI's finals at which they were evaluated (in bytes the last ones alone), after "
        "clipping. Seen afterwards, and no claim."
    )


def _rates_table(rates: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["setting", "AdamW", "SGD-SaI", "ratio", "G", "B", "√B / G", "ratio / (√B / G)"]
    cells = [
        [
            setting,
            *(f"{row[key]:.3g}" for key in ("adamw", "sgd_sai", "ratio", "gradient_norm")),
            str(row["blocks"]),
            f"{row['expected']:.3g}",
            f"{row['ratio'] / row['expected']:.2g}",
        ]
        for setting, row in rates.items()
    ]
    return markdown_table(heads, cells, left=(0,))


def _budget_text(budget: Mapping[str, Any]) -> str:
    hours, allowed = (budget[key] / 3600 for key in ("core_seconds", "allowed"))
    took = budget["spent"] / 3600
    later = [
        f"{row['later_runs']} runs of `{row['setting']}`"
        for row in budget["rows"]
        if row["later_runs"]
    ]
    longer = [f"`{row['setting']}`" for row in budget["rows"] if row["final_seconds"]]
    return (
        f"Planned: {hours:.1f} hours of one core, of {allowed:.0f} that were set for it. Added "
        f"when others had been decided, and beyond that: {', '.join(later)}, "
        f"and that the finals of {', '.join(longer)} are evaluated on all of the held-out text: "
        f"{budget['afterwards'] / 3600:.1f} hours. Training steps alone took {took:.1f} by the "
        "clock, with other work on the machine beside it. First searches whose ranges were found "
        "too low or too high (ResNet-18 twice, diffusion once) were an hour more, and are not kept;"
        " first finals on GPT-2, judged on a part of the text, and those of the first search of "
        "gpt2_long were nearly three."
    )


def _budget_table(budget: Mapping[str, Any]) -> str:
    heads = ["setting", "study", "form", "arms", "trials", "seeds", "runs"]
    heads += ["s each", "s a final", "s in all"]
    cells = [
        [
            row["setting"],
            row["study"],
            row["form"],
            *(str(row[key] or "–") for key in ("arms", "trials", "seeds", "runs")),
            f"{row['run_seconds']:g}",
            str(row["final_seconds"] or "–"),
            f"{row['core_seconds']:,.0f}",
        ]
        for row in budget["rows"]
    ]
    return markdown_table(heads, cells, left=(0, 1, 2))
