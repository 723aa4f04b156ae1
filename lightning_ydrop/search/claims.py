"""Locks that tell which worker runs which trial. The system frees them when their holder ends, however it ends.

A worker decides under one lock of the study: it looks for trials whose worker died, asks for a trial, and claims it. So
a running trial that nobody claims is a dead one; no clock and no period of grace is needed to tell.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

# Seconds after which a connection attempt is given up.
CONNECT_TIMEOUT = 10
# The number that the lock for decisions has among those of trials, which count from 0.
DECISION = -1
# So that the server notices within a minute that a machine has lost its power or its network.
KEEPALIVES = ("SET tcp_keepalives_idle = 30", "SET tcp_keepalives_interval = 10", "SET tcp_keepalives_count = 3")


class Claims(Protocol):
    """The claims of one study, as one worker holds and sees them."""

    def deciding(self) -> AbstractContextManager[None]:
        """Wait until no other worker decides, and keep the others waiting."""

    def take(self, number: int) -> None:
        """Claim a trial that no other worker has claimed."""

    def release(self, number: int) -> None:
        """Give a claim back."""

    def is_held(self, number: int) -> bool:
        """Tell whether a living worker, this one included, claims a trial. Ask only while deciding."""

    def close(self) -> None:
        """Give all claims back."""


class FileClaims:
    """Claims by flock, for workers that share a file system.

    Args:
        folder: Folder of the lock files. It is created where it is missing.
        study_name: Name of the study.

    """

    def __init__(self, folder: Path, study_name: str) -> None:
        self._folder = folder
        self._study = hashlib.sha256(study_name.encode()).hexdigest()[:12]
        self._descriptors: dict[int, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Wait until no other worker decides, and keep the others waiting."""
        with flocked(self._folder / f"{self._study}-decision"):
            yield

    def take(self, number: int) -> None:
        """Claim a trial that no other worker has claimed."""
        descriptor = os.open(self._file(number), os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._descriptors[number] = descriptor

    def release(self, number: int) -> None:
        """Give a claim back."""
        descriptor = self._descriptors.pop(number)
        self._file(number).unlink(missing_ok=True)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also where a child process has inherited it
        os.close(descriptor)

    def is_held(self, number: int) -> bool:
        """Tell whether a living worker, this one included, claims a trial. Ask only while deciding."""
        if number in self._descriptors:
            return True
        try:
            descriptor = os.open(self._file(number), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            self._file(number).unlink(missing_ok=True)  # its holder is dead
            return False
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Give all claims back."""
        for number in list(self._descriptors):
            self.release(number)

    def _file(self, number: int) -> Path:
        return self._folder / f"{self._study}-trial-{number}"


class DatabaseClaims:
    """Claims by PostgreSQL's advisory locks, which a session holds until it ends.

    A worker that loses its connection counts as dead: if another one decides before it has told its result, that one
    runs its trial again. In either case it goes on with the next.

    Args:
        url: The database.
        study_name: Name of the study.

    """

    def __init__(self, url: URL, study_name: str) -> None:
        self._study = int.from_bytes(hashlib.sha256(study_name.encode()).digest()[:4], "big", signed=True)
        self._numbers: set[int] = set()
        engine = create_engine(
            url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": CONNECT_TIMEOUT}
        )
        self._connection = engine.connect()
        for setting in KEEPALIVES:
            self._connection.execute(text(setting))

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Wait until no other worker decides, and keep the others waiting."""
        self._call("pg_advisory_lock", DECISION)
        try:
            yield
        finally:
            self._call("pg_advisory_unlock", DECISION)

    def take(self, number: int) -> None:
        """Claim a trial that no other worker has claimed."""
        if not self._call("pg_try_advisory_lock", number):
            raise BlockingIOError(f"Another worker has claimed trial {number}.")
        self._numbers.add(number)

    def release(self, number: int) -> None:
        """Give a claim back."""
        self._numbers.discard(number)
        with suppress(DBAPIError):  # a connection that broke holds nothing
            self._call("pg_advisory_unlock", number)

    def is_held(self, number: int) -> bool:
        """Tell whether a living worker, this one included, claims a trial. Ask only while deciding."""
        if number in self._numbers:
            return True
        if not self._call("pg_try_advisory_lock", number):
            return True
        self._call("pg_advisory_unlock", number)
        return False

    def close(self) -> None:
        """Give all claims back."""
        self._connection.close()

    def _call(self, function: str, number: int) -> object:
        if self._connection.invalidated:
            self._numbers.clear()
            self._connection.rollback()  # connects anew
        query = text(f"SELECT {function}(:study, :number)")
        return self._connection.execute(query, {"study": self._study, "number": number}).scalar()


@contextmanager
def flocked(file: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created where it is missing."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
