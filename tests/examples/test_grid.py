"""The grid of the paper's experiments, on a small MNIST."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.examples.programs import EXAMPLES, imported
from tests.examples.test_data import drawn, write_mnist

SETTINGS = ["data.download=false", "model.hidden=[16]", "trainer.accelerator=cpu"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "data", drawn((1, 28, 28), 100, 10, 0), drawn((1, 28, 28), 20, 10, 1))
    return tmp_path


def command(root: Path, *args: str, settings: tuple[str, ...] = ()) -> list[str]:
    return [
        *(sys.executable, str(EXAMPLES / "paper/run.py"), "--rows", "mnist_fc_1", *args, "--out", str(root / "out")),
        *("--set", f"data.root={root / 'data'}", *SETTINGS, *settings),
    ]


def run(root: Path, *args: str, settings: tuple[str, ...] = ("trainer.max_epochs=2",), rc: int = 0) -> str:
    done = subprocess.run(command(root, *args, settings=settings), capture_output=True, text=True, check=False)
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(root: Path) -> dict[str, dict[str, Any]]:
    files = (root / "out").rglob("result.json")
    return {str(file.parent.relative_to(root / "out")): json.loads(file.read_text()) for file in files}


def test_a_grid_runs_once_and_is_skipped_then(root: Path) -> None:
    args = ("--arms", "random", "--seeds", "0", "1", "--jobs", "2")
    settings = ("trainer.max_epochs=2", "ydrop.annealing_epochs=1")
    said = run(root, *args, settings=settings)
    assert "2 runs, 0 of them done before" in said
    assert "100%" in said
    found = results(root)
    assert sorted(found) == [f"mnist_fc_1/random/seed_{seed}" for seed in (0, 1)]
    for name, result in found.items():
        assert (result["arm"], result["seed"]) == ("random", int(name[-1]))
        assert 0 <= result["test_acc"] <= 1
        assert result["epochs"] == 2
        assert result["val_loss"] > 0
    assert found["mnist_fc_1/random/seed_0"]["val_loss"] != found["mnist_fc_1/random/seed_1"]["val_loss"]
    assert not list((root / "out").rglob("*.ckpt"))
    assert "2 runs, 2 of them done before" in run(root, *args, settings=settings)
    assert results(root) == found
    run(root, *args, settings=("trainer.max_epochs=3",), rc=1)  # would leave runs that cannot be compared


@pytest.mark.parametrize("arm", ["plain", "dropout", "ydrop", "inverted"])
def test_an_arm_is_given_what_it_takes(arm: str, tmp_path: Path) -> None:
    varied, settings = ("ydrop.elasticity=0.1", "model.lr=0.1"), ("ydrop.annealing_epochs=1", "data.root=data")
    run = imported("paper/experiment").Run("mnist_fc_1", arm, 3, varied, settings, tmp_path)
    callback = {each for each in run.arguments if "callbacks" in each}
    given = {f"--trainer.callbacks.init_args.{each}" for each in ("annealing_epochs=1", "elasticity=0.1", "seed=3")}
    assert callback == (given if arm in ("ydrop", "inverted") else set())
    assert {"--model.lr=0.1", "--data.root=data", "--seed_everything=3"} <= set(run.arguments)


@pytest.mark.slow
def test_values_that_vary_multiply_the_grid(root: Path) -> None:
    run(root, "--arms", "dropout", "--seeds", "0", "--vary", "data.train_fraction=0.2,1", "--keep-checkpoints")
    found = results(root)
    assert sorted(found) == [f"mnist_fc_1/dropout_data.train_fraction={share}/seed_0" for share in ("0.2", "1")]
    assert {result["varied"]["data.train_fraction"] for result in found.values()} == {"0.2", "1"}
    assert len(list((root / "out").rglob("*.ckpt"))) == 2


@pytest.mark.slow
def test_what_is_interrupted_goes_on(root: Path) -> None:
    args = ("--arms", "ydrop", "--seeds", "0")
    settings = ("trainer.max_epochs=60", "data.batch_size=8")
    process = subprocess.Popen(
        command(root, *args, settings=settings),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = root / "out/mnist_fc_1/ydrop/seed_0"
    ends = time.monotonic() + 120
    while not (folder / "checkpoints/last.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not results(root)
    run(root, *args, settings=settings)
    (result,) = results(root).values()
    assert result["resumed"]
    assert "Restored all states from the checkpoint" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_what_fails_is_named_and_the_others_run(root: Path) -> None:
    said = run(
        root,
        "--arms",
        "plain",
        "--seeds",
        "0",
        "--vary",
        "model.lr=0.01,fast",
        settings=("trainer.max_epochs=1",),
        rc=1,
    )
    assert "1 of 2 runs failed" in said
    assert "model.lr=fast" in said
    assert list(results(root)) == ["mnist_fc_1/plain_model.lr=0.01/seed_0"]


@pytest.mark.parametrize("args", [("--rows", "mnist_fc_9"), ("--arms", "jump"), ("--vary", "model.lr")])
def test_what_is_not_there_is_refused(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        imported("paper/run").main(["--rows", "mnist_fc_1", *args])
    assert args[1] in f"{caught.value} {capsys.readouterr().err}"
