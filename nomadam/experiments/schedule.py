"""The learning rate over the steps of a training: a pure function of the step."""

import dataclasses
import math
from typing import Literal

from nomadam.experiments.fields import check_types, require

ScheduleName = Literal["cosine", "linear", "step", "constant", "warmup_stable_decay"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A warm-up and a decay, as a factor of each group's learning rate.

    With w warm-up steps of T, and p = (t − w) / (T − w) for the step t = 1 … T:

        t ≤ w                     t / w
        cosine                    f + (1 − f) · (1 + cos(π p)) / 2
        linear                    1 − (1 − f) · p
        step                      decay_factor ^ (number of milestones m with m < t)
        constant                  1
        warmup_stable_decay       1, then linear to f over the last decay_fraction · T steps

    so that the last step has exactly the final fraction f.

    Args:
        name: which of the five; default cosine.
        warmup_fraction: warm-up as a fraction of the steps, 0 to 1; default 0.1. It is rounded to
            whole steps.
        warmup_steps: warm-up in steps, at least 0, in place of the fraction; default None. A
            warm-up longer than the training is a training that never reaches its learning rate.
        final_fraction: f, 0 to 1; default 0.
        milestones: for ``step``: all below 1 (fractions of the steps) or all at least 1 (steps);
            the factor falls after each of them.
        decay_factor: for ``step``, above 0 and at most 1; default 0.1.
        decay_fraction: for ``warmup_stable_decay``, above 0 and at most 1; default 0.2.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> schedule = Schedule(name="cosine", warmup_fraction=0.2)
        >>> [round(schedule.factor(step, 10), 3) for step in (1, 2, 6, 10)]
        [0.5, 1.0, 0.5, 0.0]
    """

    name: ScheduleName = "cosine"
    warmup_fraction: float = 0.1
    warmup_steps: int | None = None
    final_fraction: float = 0.0
    milestones: tuple[float, ...] = ()
    decay_factor: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "schedule.")
        for field in ("warmup_fraction", "final_fraction"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"schedule.{field}", value, "from 0 to 1")
        for field in ("decay_factor", "decay_fraction"):
            value = getattr(self, field)
            require(0 < value <= 1, f"schedule.{field}", value, "above 0 and at most 1")
        warmup = self.warmup_steps
        require(warmup is None or warmup >= 0, "schedule.warmup_steps", warmup, "at least 0")
        marks = self.milestones
        fractions = all(0 < mark < 1 for mark in marks)
        steps = all(mark >= 1 and mark == int(mark) for mark in marks)
        require(
            (fractions or steps) and list(marks) == sorted(marks),
            "schedule.milestones",
            marks,
            "in ascending order, all fractions between 0 and 1 or all whole steps of at least 1",
        )
        require(
            bool(marks) == (self.name == "step"),
            "schedule.milestones",
            marks,
            "given for the schedule named step, and for no other",
        )

    def warmup(self, steps: int) -> int:
        """Number of warm-up steps of a training of this many steps.

        Example:
            >>> Schedule(warmup_fraction=0.1).warmup(800)
            80
        """
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.warmup_fraction * steps)

    def factor(self, step: int, steps: int) -> float:
        """The factor of the learning rate at a step.

        Args:
            step: 1 to steps.
            steps: number of steps of the training.

        Raises:
            ValueError: for a step outside the training.

        Example:
            >>> Schedule(name="step", milestones=(0.4, 0.8), warmup_steps=0).factor(9, 10)
            0.010000000000000002
        """
        require(1 <= step <= steps, "step", step, f"from 1 to {steps}")
        warmup = self.warmup(steps)
        if step <= warmup:
            return step / warmup
        if self.name == "constant":
            return 1.0
        if self.name == "step":
            marks = [round(m * steps) if m < 1 else m for m in self.milestones]
            return self.decay_factor ** sum(mark < step for mark in marks)
        progress = (step - warmup) / (steps - warmup)
        if self.name == "warmup_stable_decay":
            length = max(1, min(round(self.decay_fraction * steps), steps - warmup))
            progress = max(0, step - (steps - length)) / length
        fall = progress if self.name != "cosine" else (1 - math.cos(math.pi * progress)) / 2
        return self.final_fraction + (1 - self.final_fraction) * (1 - fall)
