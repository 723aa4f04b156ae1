"""Workers as processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search import processes
from lightning_ydrop.search.processes import num_cores, share, start_workers

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)


def note(folder: str, *ends: str) -> None:
    """Leave a file that is named after this process, except for the first ones, which end otherwise."""
    for number, end in enumerate(ends):
        try:
            Path(folder, f"end-{number}").mkdir()
        except FileExistsError:
            continue
        if end == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ConfigurationError("given.", "allowed.", "remedy.")
    Path(folder, f"threads-{os.getpid()}").write_text(os.environ["OMP_NUM_THREADS"])


def stay(folder: str) -> None:
    note(folder)
    time.sleep(600)


def threads(folder: Path) -> list[str]:
    return [file.read_text() for file in folder.glob("threads-*")]


def test_workers_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ticks: list[int] = []
    assert start_workers(2, note, str(tmp_path), tick=lambda: ticks.append(1), tick_seconds=0.1) == [
        0,
        0,
    ]
    assert threads(tmp_path) == ["3", "3"]
    assert len(ticks) > 2
    assert "OMP_NUM_THREADS" not in os.environ


def test_one_worker_is_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ticks: list[int] = []
    assert start_workers(1, note, str(tmp_path), tick=lambda: ticks.append(1)) == [0]
    assert (tmp_path / f"threads-{os.getpid()}").read_text() == "6"
    assert ticks
    assert os.environ["OMP_NUM_THREADS"] == "1"
    with pytest.raises(ConfigurationError, match="given"):
        start_workers(1, note, str(tmp_path), "refuse")


def test_a_worker_that_dies_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    assert sorted(start_workers(3, note, str(tmp_path), "die", "refuse", say=said.append)) == [-9, 0, 1]
    assert sorted(line.partition(" ")[2][2:] for line in said) == [
        "ended with 1: given. allowed. remedy.",
        "was killed by signal 9.",
    ]
    assert len(threads(tmp_path)) == 1


def test_what_all_workers_refuse_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"given\. allowed\. remedy\."):
        start_workers(2, note, str(tmp_path), "refuse", "refuse")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    program = (
        "from tests.search.test_processes import stay; from lightning_ydrop.search.processes import start_workers\n"
        f"if __name__ == '__main__': start_workers(2, stay, {str(tmp_path)!r})"
    )
    file = tmp_path / "program.py"
    file.write_text(program)
    parent = subprocess.Popen(
        [sys.executable, str(file)],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(threads(tmp_path)) == 2)
        parent.send_signal(number)
        assert parent.wait(120) == {signal.SIGTERM: 143, signal.SIGINT: -2, signal.SIGKILL: -9}[number]
        workers = [int(file.name.split("-")[1]) for file in tmp_path.glob("threads-*")]
        wait_until(lambda: not any(map(is_running, workers)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_gpus_are_those_that_the_user_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share(index, 3)["CUDA_VISIBLE_DEVICES"] for index in range(3)] == ["5", "7", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [share(index, 3)["CUDA_VISIBLE_DEVICES"] for index in range(3)] == ["0", "1", "0"]


def test_each_worker_has_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert share(0, num_cores() + 1) == {"OMP_NUM_THREADS": "1"}


def test_a_number_of_workers_is_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"start_workers\(count=0\) was given"):
        start_workers(0, note)
