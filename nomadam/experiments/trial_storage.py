"""The database behind a search: opened for optuna, its transactions in order, its plan checked."""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nomadam.experiments.configuration import differing_fields

# How long a process waits for another one that writes to the same SQLite file.
BUSY_SECONDS = 60
OPENING_TRIES = 5


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite database in a file."""
    return f"sqlite:///{path.resolve()}"


def open_storage(url: str) -> Any:
    """Open a database for optuna, and make its tables where they are missing.

    Args:
        url: as SQLAlchemy takes it, such as ``postgresql://user:password@host/name``. SQLite is
            for the processes of one machine.

    Raises:
        ValueError: for what is no URL, and a database that can not be opened.
        ImportError: optuna, or the driver that the URL names, is missing.

    Example:
        >>> open_storage("postgres//host")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: --storage 'postgres//host' is no database URL: ...
    """
    try:
        import optuna
        from sqlalchemy import create_engine
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError
    except ImportError as error:
        raise ImportError('tuning needs optuna: pip install "nomadam[lab]"') from error
    try:
        parsed = make_url(url)
        shown = repr(parsed.render_as_string(hide_password=True))
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite and parsed.database in (None, "", ":memory:"):
            raise ValueError(f"--storage {shown} is lost when the process ends; name a file")
        options = {"timeout": BUSY_SECONDS} if is_sqlite else {}
        create_engine(parsed, connect_args=options).connect().close()
    except ImportError as error:
        raise ImportError(f"--storage {shown} needs a driver: pip install {error.name}") from error
    except ArgumentError as error:
        raise ValueError(f"--storage {url!r} is no database URL: {_first_line(error)}") from error
    except SQLAlchemyError as error:
        raise ValueError(f"--storage {shown} can not be opened: {_first_line(error)}") from error
    kwargs = {"connect_args": options} if is_sqlite else {"pool_pre_ping": True}
    storage = None
    for left in reversed(range(OPENING_TRIES)):
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=kwargs)
            break
        except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            # Another process may be making the tables.
            if not left:
                raise ValueError(
                    f"--storage {shown} can not be opened: {_first_line(error)}"
                ) from error
            time.sleep(random.uniform(0.2, 1.0))
    if is_sqlite:
        _lock_before_reading(storage)
    return storage


def open_study(storage: Any, name: str, plan: dict[str, Any]) -> Any:
    """Open the optuna study of a search, or make it.

    Args:
        storage: from `open_storage`.
        name: of the study.
        plan: what the search is, as JSON; kept with the study.

    Raises:
        ValueError: the study holds another search; the differences are named.
    """
    import optuna

    study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    if "plan" not in study.user_attrs:
        study.set_user_attr("plan", plan)
    check_plan(study, plan)
    return study


def check_plan(study: Any, plan: dict[str, Any]) -> None:
    """Refuse a study that holds another search.

    Raises:
        ValueError: with the fields in which they differ.
    """
    held, asked = study.user_attrs["plan"], json.loads(json.dumps(plan))
    if held != asked:
        lines = [
            f"  {field}: {there!r} there, {here!r} here"
            for field, (there, here) in differing_fields(held, asked).items()
        ]
        name = study.study_name
        raise ValueError(
            f"{name} holds another search, choose another --out; they differ in\n"
            + "\n".join(lines)
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which optuna does not write its own lines about every trial."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError('tuning needs optuna: pip install "nomadam[lab]"') from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _lock_before_reading(storage: Any) -> None:
    """Have each transaction of SQLite begin with its lock, as other databases lock the row."""
    from sqlalchemy import event

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "connect", connected)
    event.listen(storage.engine, "begin", begun)
    storage.engine.dispose()
