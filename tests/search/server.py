"""A server of PostgreSQL on the loopback, started and ended by the tests."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

# Who asks for a password, and who does not.
ACCESS = """\
host all careful 127.0.0.1/32 scram-sha-256
host all all 127.0.0.1/32 trust
"""


class Server:
    """A running server.

    Attributes:
        port: Its port on 127.0.0.1.

    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._count = 0

    def execute(self, *statements: str) -> None:
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def database(self) -> str:
        """Create a database, and give its URL."""
        self._count += 1
        self.execute(f"CREATE DATABASE study_{self._count}")
        return self._address(f"study_{self._count}")

    def _address(self, database: str) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/{database}"


def programs() -> Path | None:
    """Find the folder of PostgreSQL's programs."""
    if found := sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return found[-1].parent
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """Start a server in a folder of its own, and end it."""
    folder_of_programs = programs()
    if folder_of_programs is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    # PostgreSQL refuses root.
    other = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        if other:
            shutil.chown(folder, "nobody", "nogroup")
        data = folder / "data"
        initialise = [folder_of_programs / "initdb", "-D", data, "-U", "tester", "--no-sync", "--auth=trust"]
        subprocess.run(initialise, check=True, stdout=subprocess.DEVNULL, cwd=folder, **other)  # type: ignore[call-overload]
        (data / "pg_hba.conf").write_text(ACCESS)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve = [folder_of_programs / "postgres", "-D", data, "-p", str(port), "-c", "fsync=off"]
        serve += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(serve, stdout=log, stderr=log, cwd=folder, **other)  # type: ignore[call-overload]
        try:
            server = Server(port)
            wait_until_ready(server, process, folder / "log")
            yield server
        finally:
            process.send_signal(signal.SIGQUIT)  # at once
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_ready(server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    ends = time.monotonic() + 60
    while True:
        try:
            return server.execute("SELECT 1")
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends
            time.sleep(0.05)
