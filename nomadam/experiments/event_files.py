"""TensorBoard event files beside the metrics."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def summary_writer() -> Any:
    """Return torch's class that writes event files.

    Raises:
        ImportError: without tensorboard, naming what to install.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ImportError("event files need TensorBoard: pip install tensorboard") from error
    return SummaryWriter


@contextlib.contextmanager
def event_files(
    folder: Path, *, first_step: int, wanted: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that writes a record's numbers as TensorBoard scalars.

    Args:
        folder: of the event files.
        first_step: what was written from this step on before is superseded.
        wanted: where False, the function does nothing and no file is made.

    Raises:
        ImportError: without tensorboard, naming what to install.
    """
    if not wanted:
        yield lambda record: None
        return
    with summary_writer()(str(folder), purge_step=first_step) as writer:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, record["step"])

        yield write
