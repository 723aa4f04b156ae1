from collections.abc import Iterator

import optuna
import pytest

from tests.search.server import Server, running_server


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server of PostgreSQL, or a skip."""
    with running_server() as running:
        yield running


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest) -> str:
    """A journal file in the working folder, or a database."""
    if request.param == "journal":
        return "study.journal"
    server: Server = request.getfixturevalue("server")
    return server.database()
