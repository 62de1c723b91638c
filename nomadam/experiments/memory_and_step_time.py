"""The paper's Tables 1 and 3: optimizer state from the shapes, and the step from the clock."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nomadam.experiments.fields import require
from nomadam.experiments.study import Findings, Study, Table, parts_of
from nomadam.runs import RunFolder

# The paper's four models, by the names of the cost package.
MODELS = ("vit_s_16", "vit_h_14", "gpt2_xl", "llama2_7b")

# The paper's optimizers, and what stands for each of them at the clock. The paper timed Python
# loops; beside them is what the same optimizer takes with torch's or our fast paths.
CLOCKED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sgdm": ("torch_sgd_foreach", "torch_sgd_fused"),
        "adamw": ("torch_adamw_foreach", "torch_adamw_fused"),
        "adam_mini": ("adam_mini",),
        "prodigy": ("prodigy",),
        "sgd_sai": ("released_sgd_sai", "sgd_sai_for_loop", "sgd_sai_foreach", "sgd_sai_fused"),
    }
)
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryAndStepTime(Study):
    """State and step time of the paper's optimizers on the tensors of its models, in float32.

    No model is run and nothing is learned: the tensors have the models' shapes, and the gradients
    are random. State needs no memory; what is timed and does not fit is skipped by name.

    Args:
        models: whose state is counted; of `MODELS`, at least one.
        timed: those of them that are stepped by the clock; may be empty.
        rounds: in each every optimizer takes a step, at least 1; default 20.
        seconds: an optimizer that would take longer takes fewer steps, at least 2; above 0.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> demo().timed
        ('vit_s_16',)
    """

    models: tuple[str, ...] = MODELS
    timed: tuple[str, ...] = MODELS
    rounds: int = 20
    seconds: float = 10.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        known = "one or several of " + ", ".join(MODELS)
        require(bool(self.models) and set(self.models) <= set(MODELS), "models", self.models, known)
        of_them = "empty, or some of " + ", ".join(self.models)
        require(set(self.timed) <= set(self.models), "timed", self.timed, of_them)
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.seconds > 0, "seconds", self.seconds, "above 0")

    def measure(
        self,
        home: RunFolder,
        *,
        device: str,
        cache: str | Path | None,
        make_progress: Callable[[str, int], Any],
        tell: Callable[[str], None],
    ) -> Findings:
        """Count the state of all models, and time those that are to be timed, a part each."""
        from nomadam.experiments.cost.published import state_table

        states = state_table(self.models)
        parts = parts_of(home)
        times = {}
        for model in self.timed:
            found = parts.read_object(f"{model}.json")
            if found is None:
                tell(f"{model}:")
                found = self._step_times(model, device, tell)
                parts.write_json(f"{model}.json", found)
            times[model] = found
        return Findings(
            numbers=_numbers(states, times), tables=(_state_rows(states), _time_rows(times))
        )

    def _step_times(self, model: str, device: str, tell: Callable[[str], None]) -> dict[str, Any]:
        from nomadam.experiments.cost import models
        from nomadam.experiments.cost.contenders import choose
        from nomadam.experiments.cost.timing import measure_steps
        from nomadam.experiments.resources import device_named, environment

        where = device_named(device)
        contenders = choose([name for names in CLOCKED.values() for name in names])
        found = measure_steps(
            models.MODELS[model],
            contenders,
            where,
            rounds=self.rounds,
            seconds=self.seconds,
            tell=tell,
        )
        names = environment(where)
        return {**found, "device_name": names["device_name"], "threads": names["threads"]}


def demo() -> Study:
    """State of the paper's four models, and step times on ViT-S/16: a minute on two cores.

    Example:
        >>> demo().models
        ('vit_s_16', 'vit_h_14', 'gpt2_xl', 'llama2_7b')
    """
    return MemoryAndStepTime(
        name="memory_and_step_time.demo", timed=("vit_s_16",), rounds=10, seconds=1.5
    )


def paper() -> Study:
    """State and step times of the paper's four models; what does not fit is skipped by name.

    Llama-2-7B with AdamW takes 110 GB, with Prodigy twice as much.

    Example:
        >>> paper().timed == paper().models
        True
    """
    return MemoryAndStepTime(name="memory_and_step_time.paper")


def _numbers(states: Mapping[str, Any], times: Mapping[str, Any]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for model, state in states.items():
        for name, size in state.items():
            numbers[f"{model}.{name}.state_bytes"] = size
    for model, found in times.items():
        for name, row in found["rows"].items():
            numbers[f"{model}.{name}.step_ms"] = row["step_ms"]["median"]
    return numbers


def _state_rows(states: Mapping[str, Mapping[str, int]]) -> Table:
    from nomadam.experiments.cost.models import LABELS
    from nomadam.experiments.cost.published import PAPER

    rows = [
        (
            LABELS[model],
            name,
            round(size / GIB, 2),
            PAPER[model][name][0] if name in PAPER[model] else None,
            round(size / state["adamw"], 3),
        )
        for model, state in states.items()
        for name, size in state.items()
    ]
    return Table(
        title="Optimizer state",
        heads=("model", "optimizer", "state, GiB", "paper, GB", "of AdamW's"),
        rows=rows,
        note="Of all parameters in float32, from the shapes alone; 1 GiB = 2^30 bytes, which the "
        "paper's GB are near to. Momentum in fewer bits is not in the paper.",
    )


def _time_rows(times: Mapping[str, Mapping[str, Any]]) -> Table:
    from nomadam.experiments.cost.contenders import CONTENDERS
    from nomadam.experiments.cost.models import LABELS
    from nomadam.experiments.cost.published import PAPER

    rows = []
    for model, found in times.items():
        for name in CLOCKED:
            for clocked in CLOCKED[name]:
                row = found["rows"].get(clocked)
                rows.append(
                    (
                        LABELS[model],
                        name,
                        CONTENDERS[clocked].label,
                        None if row is None else row["step_ms"]["median"],
                        None if row is None or not row["ratio"] else row["ratio"]["median"],
                        PAPER[model][name][1],
                        found["skipped"].get(clocked, ""),
                    )
                )
    places = {f"{each['device_name']}, {each['threads']} threads" for each in times.values()}
    return Table(
        title="Optimizer step",
        heads=("model", "optimizer", "as", "step, ms", "of fused SGD's", "paper, ms", "skipped"),
        rows=rows,
        note=f"Medians; every round steps each once, in turn. On {' and '.join(sorted(places))}. "
        "The paper's are of one A100 with 80 GB, whose optimizers loop in Python, and which "
        "waited for nothing before it read the clock: compare the order, not the numbers."
        if times
        else "Nothing was timed.",
    )
