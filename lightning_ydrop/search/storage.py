"""Where a study is kept: a journal file for the workers of one machine, PostgreSQL for those of several."""

import fcntl
import mmap
import os
import re
import weakref
from pathlib import Path
from typing import Literal

import optuna
import sqlalchemy
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from lightning_ydrop.checks import check_count
from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search.claims import CONNECT_TIMEOUT, Claims, DatabaseClaims, FileClaims, flocked

KINDS = "A storage is the path of a journal file, for one machine, or postgresql://USER:PASSWORD@HOST/DATABASE."


class FlockedJournal(JournalFileOpenLock):
    """The lock of a journal file: one that the system frees when its holder is killed.

    Optuna's own locks are files, which a killed worker leaves; the others then wait for 30 seconds.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self._file = file.with_name(f"{file.name}.flock")
        self._descriptor = -1

    def acquire(self) -> bool:
        """Wait for the lock, and take it."""
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give the lock back."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def open_study(
    storage: str | Path,
    name: str,
    *,
    direction: Literal["minimize", "maximize"] = "minimize",
    sampler: BaseSampler | None = None,
    workers: int = 1,
) -> optuna.Study:
    """Open a study, or start it.

    Args:
        storage: Path of a journal file, or URL of a database.
        name: Name of the study.
        direction: Whether values are to be small or large.
        sampler: What draws trials; Optuna's default where it is None.
        workers: How many processes will work on the storage.

    Returns:
        The study.

    Raises:
        ConfigurationError: If the storage can't be used.

    """
    opened = open_storage(storage, workers)
    verbosity = optuna.logging.get_verbosity()
    # Each worker opens the study, and Optuna would tell of each.
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        return optuna.create_study(
            study_name=name, storage=opened, direction=direction, sampler=sampler, load_if_exists=True
        )
    finally:
        optuna.logging.set_verbosity(verbosity)


def open_storage(storage: str | Path, workers: int = 1) -> BaseStorage:
    """Open a storage of Optuna that several workers may share.

    Args:
        storage: Path of a journal file, which is created where it is missing, or URL of a database.
        workers: How many processes will work on it.

    Returns:
        The storage.

    Raises:
        ConfigurationError: If the storage can't be reached or written to, or is none for so many workers.

    """
    owner = f"open_storage({shown(storage)!r}, workers={workers!r})"
    workers = check_count(f"open_storage({shown(storage)!r}, ...)", "workers", workers, minimum=1, example=2)
    if not is_url(storage):
        return _open_journal(owner, Path(storage))
    url = _url(owner, str(storage))
    if url.get_backend_name() != "sqlite":
        return _open_database(owner, url)
    if workers > 1:
        raise ConfigurationError(
            f"{owner} was called.",
            "SQLite takes one worker: it locks no rows, so two workers may be handed the same trial.",
            "Pass a path without sqlite:///, which makes a journal file, or the URL of PostgreSQL.",
        )
    return _open_sqlite(owner, url)


def open_claims(storage: str | Path, study_name: str) -> Claims:
    """Open the claims of a study: the locks that tell which worker runs which trial.

    Args:
        storage: Path or URL, as given to `open_storage`.
        study_name: Name of the study.

    Returns:
        The claims of one worker. Each process opens its own.

    Raises:
        ConfigurationError: If the storage can't be reached, or its file system has no locks.

    """
    owner = f"open_claims({shown(storage)!r}, {study_name!r})"
    if is_url(storage):
        url = _url(owner, str(storage))
        if url.get_backend_name() != "sqlite":
            return _open_database_claims(owner, url, study_name)
        file = Path(str(url.database)).absolute()
    else:
        file = Path(storage).expanduser().absolute()
    try:
        claims = FileClaims(file.with_name(f"{file.name}.claims"), study_name)
        with claims.deciding():
            return claims
    except OSError as error:
        raise _unwritable(owner, error) from None


def is_url(storage: str | Path) -> bool:
    """Tell the URL of a database from the path of a journal file."""
    return isinstance(storage, str) and "://" in storage


def shown(storage: str | Path) -> str:
    """Write a storage without its password."""
    text = re.sub(r"(://[^:@/?#]*:).*@", r"\1***@", str(storage))
    return re.sub(r"(\w*pass\w*=)[^&]*", r"\1***", text)


def _open_journal(owner: str, path: Path) -> BaseStorage:
    file = path.expanduser().absolute()
    lock = FlockedJournal(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with flocked(file.with_name(f"{file.name}.flock")), file.open("ab+") as opened:
            _check_journal(owner, file, opened.fileno())
    except OSError as error:
        raise _unwritable(owner, error) from None
    try:
        return JournalStorage(JournalFileBackend(str(file), lock))
    except (ValueError, KeyError) as error:
        raise _no_journal(owner, f"Optuna can't read this one: {type(error).__name__}: {error}.") from None


def _check_journal(owner: str, file: Path, descriptor: int) -> None:
    """Refuse a file that is no journal, or whose last line is torn: Optuna would read it, and fail as it writes."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
        is_sqlite, is_json = content[:15] == b"SQLite format 3", content[:1] == b"{"
        whole = content.rfind(b"\n") + 1
    if is_sqlite:
        raise _no_journal(owner, f"This one is a database of SQLite; one worker may use it as sqlite:///{file}.")
    if not is_json:
        raise _no_journal(owner, "This one starts with something else.")
    if whole != size:
        raise ConfigurationError(
            f"{owner} was called.",
            "Each line of a journal ends with a newline; the last one of this file is torn, as when a machine loses "
            "power.",
            f"Cut it off after the last newline: truncate --size={whole} {file}",
        )


def _no_journal(owner: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"{owner} was called.",
        f"A journal is a file that Optuna's JournalStorage wrote, each line an object of JSON. {reason}",
        "Name another file; one that does not exist is created.",
    )


def _unwritable(owner: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{owner} was called.",
        f"A journal and its locks need a folder that can be written to and a file system with flock: {error}.",
        "Name a file in another folder, or pass the URL of PostgreSQL.",
    )


def _url(owner: str, storage: str) -> sqlalchemy.URL:
    """Read a URL, and refuse a database that workers can't share."""
    try:
        url = sqlalchemy.make_url(storage)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"{owner} was called.", KINDS, "Correct the URL.") from None
    if "@" in (url.host or ""):
        raise ConfigurationError(
            f"{owner} was called.",
            "The password of a URL is percent-encoded.",
            "Write its special characters as urllib.parse.quote does: @ is %40.",
        )
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")  # SQLAlchemy's own choice is psycopg2
    backend = url.get_backend_name()
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigurationError(
            f"{owner} was called.",
            "A study that is to be gone on with is kept in a file.",
            "Pass a path, such as runs/study.journal.",
        )
    if backend not in ("sqlite", "postgresql"):
        raise ConfigurationError(
            f"{owner} was called.", KINDS, "Pass the URL of PostgreSQL, or a path without a scheme."
        )
    return url


def _open_database(owner: str, url: sqlalchemy.URL) -> BaseStorage:
    claims = _open_database_claims(owner, url, "creation of tables")
    try:
        # Two machines that create the tables at once would fail.
        with claims.deciding():
            return _rdb_storage(owner, url, {"connect_timeout": CONNECT_TIMEOUT})
    finally:
        claims.close()


def _open_sqlite(owner: str, url: sqlalchemy.URL) -> BaseStorage:
    return _rdb_storage(owner, url, {})


def _rdb_storage(owner: str, url: sqlalchemy.URL, connect_args: dict[str, int]) -> BaseStorage:
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # Optuna formats it
    try:
        storage = RDBStorage(text, engine_kwargs={"pool_pre_ping": True, "connect_args": connect_args})
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        raise _unusable(owner, url, error) from None
    weakref.finalize(storage, storage.engine.dispose)  # Optuna leaves connections open
    return storage


def _open_database_claims(owner: str, url: sqlalchemy.URL, study_name: str) -> DatabaseClaims:
    try:
        return DatabaseClaims(url, study_name)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{owner} was called.",
            f"Its driver is not installed: {error.name}.",
            'Run pip install "lightning-ydrop[search]", which brings psycopg, the driver of postgresql:// URLs.',
        ) from None
    except SQLAlchemyError as error:
        raise _unusable(owner, url, error) from None


def _unusable(owner: str, url: sqlalchemy.URL, error: Exception) -> ConfigurationError:
    """Say what a database answered, without its password."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    reason = " ".join(str(getattr(cause, "orig", None) or cause).split())
    for secret in filter(None, (url.password, *(url.query[name] for name in url.query if "pass" in name))):
        reason = reason.replace(str(secret), "***")
    where = f"host {url.host or 'localhost'}, port {url.port or 5432}, database {url.database}, user {url.username}"
    if url.get_backend_name() == "sqlite":
        where = f"the file {url.database} and its folder"
    return ConfigurationError(
        f"{owner} was called.",
        f"The database has to answer before the first trial; it said: {reason}",
        f"Check {where}, the right to create tables, and the password, if there is one.",
    )
