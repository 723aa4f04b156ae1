"""What all tests share."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # these networks are so small that threads would only wait for each other


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let MNIST come in from outside: tests that want it skip without it."""
    parser.addoption("--mnist-root", default=None, help="folder that holds MNIST/raw")


@pytest.fixture
def mnist_root(request: pytest.FixtureRequest) -> str:
    """Folder of MNIST, or a skip."""
    root = request.config.getoption("--mnist-root")
    if root is None:
        pytest.skip("needs --mnist-root=DIR")
    root = request.config.invocation_params.dir / root  # as typed, though each test runs in a folder of its own
    return str(Path(root).resolve())


@pytest.fixture
def rows_known_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averages over masks make no passes to learn whether rows influence each other: for tests that count passes."""
    monkeypatch.setattr("lightning_ydrop.uncertainty.mixing.rows_mix", lambda *_: False)
