"""How far a training run is: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Self, TextIO

PLAIN_PARTS = 10
PLAIN_SECONDS = 30.0
RECENT_STEPS = 20
BAR = "━━━━"  # as short as it gets


class Progress:
    """Show the step, the losses, the speed and the time left of one training run.

    In a terminal one line is redrawn; elsewhere a plain line is written for the first step, each
    tenth of the run, every 30 seconds, and the last step.

    Args:
        label: what the line begins with.
        steps: number of steps of the whole run, at least 1.
        stream: where to write; default standard error.

    Example:
        >>> with Progress("adamw", 2, stream=sys.stdout) as progress:  # doctest: +ELLIPSIS
        ...     progress({"step": 1, "tokens": 64, "seconds": 0.5, "train_loss": 8.5})
        ...     progress({"step": 2, "tokens": 128, "seconds": 1.0, "train_loss": 8.25})
        adamw  step 1/2  loss 8.500  128 tokens/s  ...
        adamw  step 2/2  loss 8.250  128 tokens/s  took ...
    """

    def __init__(self, label: str, steps: int, stream: TextIO | None = None) -> None:
        """See the class."""
        self.label = label
        self.steps = steps
        self.stream = sys.stderr if stream is None else stream
        self.bar: Any = None
        self.task: Any = None
        self.validation_loss: float | None = None
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)
        self.first_step: int | None = None
        self.started = time.monotonic()
        self.last_line = 0.0

    def __enter__(self) -> Self:
        """Start drawing."""
        if self.stream.isatty():
            self.bar = _bar(self.stream)
            fields = {"count": f"0/{self.steps}", "status": "starting", "left": ""}
            self.task = self.bar.add_task(self.label, total=self.steps, **fields)
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last state of the line in the terminal."""
        if self.bar is not None:
            self.bar.stop()

    def stage(self, label: str, steps: int) -> "Progress":
        """A line of its own for a training that comes before this one, in the same place."""
        stage = Progress(label, steps, self.stream)
        if self.bar is not None:
            stage.bar = self.bar
            fields = {"count": f"0/{steps}", "status": "starting", "left": ""}
            stage.task = self.bar.add_task(label, total=steps, **fields)
        return stage

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Show one step, given as its line of ``metrics.jsonl`` and the ``unit`` of its tokens."""
        step = record["step"]
        if self.first_step is None:
            # What came before the first step seen is known from the record, not from this clock.
            self.first_step = step - 1
            self.started = time.monotonic() - record.get("step_ms", 0.0) / 1e3
            before = (step - 1) / step
            self.recent.append((record["tokens"] * before, record["seconds"] * before))
        self.recent.append((record["tokens"], record["seconds"]))
        if record.get("validation_loss") is not None:
            self.validation_loss = record["validation_loss"]
        left = self._time_left(step)
        if self.bar is not None:
            count = f"{step}/{self.steps}"
            room = self.bar.console.width - len(f"{self.label} {BAR} {count} {left} ")
            status = self._status(record, room)
            self.bar.update(self.task, completed=step, count=count, status=status, left=left)
        elif self._line_is_due(step):
            self.last_line = time.monotonic()
            words = f"{self.label}  step {step}/{self.steps}  {self._status(record)}  {left}"
            self.stream.write(words.rstrip() + "\n")
            self.stream.flush()

    def _status(self, record: Mapping[str, Any], room: int = 80) -> str:
        """The losses and the speed; what is of less use is left out where there is no room."""
        loss = f"loss {_loss(record.get('train_loss'))}"
        known = self.validation_loss is not None
        validation = [f"val {_loss(self.validation_loss)}"] if known else []
        counted = self.recent[-1][0] - self.recent[0][0]
        seconds = self.recent[-1][1] - self.recent[0][1]
        unit = record.get("unit", "token")
        speed = [f"{_short(counted / seconds)} {unit}s/s"] if seconds > 0 else []
        forms = ["  ".join(words) for words in ([loss, *validation, *speed], [loss, *speed])]
        return next((words for words in forms if len(words) <= room), loss)

    def _time_left(self, step: int) -> str:
        assert self.first_step is not None
        seconds = time.monotonic() - self.started
        if step >= self.steps:
            return f"took {duration(seconds)}"
        return f"{duration(seconds / (step - self.first_step) * (self.steps - step))} left"

    def _line_is_due(self, step: int) -> bool:
        assert self.first_step is not None
        part = -(-self.steps // PLAIN_PARTS)
        return (
            step == self.first_step + 1
            or step == self.steps
            or step % part == 0
            or time.monotonic() - self.last_line > PLAIN_SECONDS
        )


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    whole = [
        TextColumn(f"{{task.{field}}}", markup=False, table_column=Column(no_wrap=True))
        for field in ("description", "fields[count]", "fields[status]", "fields[left]")
    ]
    bar = BarColumn(bar_width=None, table_column=Column(min_width=len(BAR), ratio=1))
    return RichProgress(
        whole[0], bar, *whole[1:], console=Console(file=stream), expand=True, refresh_per_second=4
    )


def show_cursor(stream: TextIO) -> None:
    """Bring back the cursor of a terminal, which a killed process may have left hidden.

    Example:
        >>> show_cursor(sys.stdout)
    """
    if stream.isatty():
        stream.write("\x1b[?25h")
        stream.flush()


def duration(seconds: float) -> str:
    """Write a duration in seconds, from a minute on as a clock does.

    Example:
        >>> duration(0.42), duration(41.7), duration(75.2), duration(7384)
        ('0.4 s', '42 s', '1:15', '2:03:04')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _short(rate: float) -> str:
    if rate >= 1e6:
        return f"{rate / 1e6:.1f}M"
    return f"{rate / 1e3:.1f}k" if rate >= 1e4 else f"{rate:.0f}"


class NoProgress:
    """Takes what `Progress` takes, and shows nothing."""

    def __init__(self, label: str, steps: int) -> None:
        """See the class."""

    def __enter__(self) -> Self:
        """Nothing."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing."""

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Nothing."""
