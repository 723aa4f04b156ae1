"""The grid of the paper's experiments, on a small MNIST."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from examples.paper import experiment
from examples.paper import run as grid_program
from tests.examples.programs import ENVIRONMENT
from tests.examples.test_data import drawn, write_mnist

SETTINGS = ["data.download=false", "model.hidden=[16]", "trainer.accelerator=cpu"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "data", drawn((1, 28, 28), 100, 10, 0), drawn((1, 28, 28), 20, 10, 1))
    return tmp_path


def command(root: Path, *args: str, settings: tuple[str, ...] = ()) -> list[str]:
    return [
        *(sys.executable, "-m", "examples.paper.run", "--rows", "mnist_fc_1", *args, "--out", str(root / "out")),
        *("--set", f"data.root={root / 'data'}", *SETTINGS, *settings),
    ]


def run(root: Path, *args: str, settings: tuple[str, ...] = ("trainer.max_epochs=2",), rc: int = 0) -> str:
    done = subprocess.run(
        command(root, *args, settings=settings), capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(root: Path) -> dict[str, dict[str, Any]]:
    files = (root / "out").rglob("result.json")
    return {str(file.parent.relative_to(root / "out")): json.loads(file.read_text()) for file in files}


def test_a_grid_runs_once_and_is_skipped_then(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def again(*settings: str) -> str:
        grid_program.main(command(root, *args, settings=settings)[3:])
        return capsys.readouterr().out

    args = ("--arms", "random", "--seeds", "0", "1", "--jobs", "1")
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
    assert "2 runs, 2 of them done before" in again(*settings)
    assert results(root) == found
    # Elsewhere it is the same, and with other settings it is another that cannot be compared.
    assert "2 of them done before" in again(*settings, f"data.root={root}")
    with pytest.raises(SystemExit, match=r"run\.json is of a run with other settings"):
        again("trainer.max_epochs=3")


@pytest.mark.parametrize("arm", ["plain", "dropout", "ydrop", "inverted"])
def test_an_arm_is_given_what_it_takes(arm: str, tmp_path: Path) -> None:
    varied, settings = ("ydrop.elasticity=0.1", "model.lr=0.1"), ("ydrop.annealing_epochs=1", "data.root=data")
    run = experiment.Run("mnist_fc_1", arm, 3, varied, settings, tmp_path)
    callback = {each for each in run.arguments if "callbacks" in each}
    given = {f"--trainer.callbacks.init_args.{each}" for each in ("annealing_epochs=1", "elasticity=0.1", "seed=3")}
    assert callback == (given if arm in ("ydrop", "inverted") else set())
    # What is said on the command line is not written over by the files.
    last_file = max(place for place, each in enumerate(run.arguments) if each.startswith("--config"))
    assert last_file == 3
    assert {"--model.lr=0.1", "--data.root=data", "--seed_everything=3"} <= set(run.arguments)


def test_a_value_may_follow_the_seed(tmp_path: Path) -> None:
    varied, settings = ("model.lr=0.{seed}",), ("data.split_seed={seed}", "ydrop.num_samples={seed}")
    runs = [experiment.Run("mnist_fc_1", "ydrop", seed, varied, settings, tmp_path) for seed in (3, 4)]
    for run in runs:
        assert {f"--model.lr=0.{run.seed}", f"--data.split_seed={run.seed}"} <= set(run.arguments)
        assert f"--trainer.callbacks.init_args.num_samples={run.seed}" in run.arguments
        assert run.identity["settings"] == sorted(settings)
        assert run.identity["varied"] == {"model.lr": "0.{seed}"}
    assert runs[0].folder.parent == runs[1].folder.parent


def test_a_run_is_what_matters_to_it(tmp_path: Path) -> None:
    def identity(arm: str, *settings: str) -> dict[str, Any]:
        found: dict[str, Any] = experiment.Run("mnist_fc_1", arm, 0, (), settings, tmp_path).identity
        return found

    assert identity("plain", "a=1", "b=2") == identity("plain", "b=2", "data.root=there", "a=1", "ydrop.n_steps=2")
    assert identity("ydrop") != identity("ydrop", "ydrop.n_steps=2")
    assert identity("plain", "a=1", "a=2") == identity("plain", "a=2") != identity("plain", "a=2", "a=1")
    assert identity("plain", "a+=1", "a+=2")["settings"] == ["a+=1", "a+=2"]
    assert identity("plain")["files"] != identity("dropout")["files"]


def test_a_folder_is_one_processs_at_a_time(tmp_path: Path) -> None:
    run = experiment.Run("mnist_fc_1", "plain", 0, (), (), tmp_path)
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / "lock"):
        assert "another process is at it" in (experiment.carry_out(run) or "")


def test_what_is_killed_alone_leaves_its_run_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sleeping.py"
    program.write_text(
        "import os, pathlib, time\n"
        "def main(args):\n"
        "    pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    grid = (
        "from pathlib import Path; from examples.paper import experiment\n"
        "experiment.PROGRAM = 'sleeping'\n"
        "experiment.carry_out(experiment.Run('digits', 'plain', 0, (), (), Path('out')))"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(tmp_path)])}
    process = subprocess.Popen([sys.executable, "-c", grid], env=environment)
    wait_for(tmp_path / "pid", process)
    process.kill()
    process.wait()
    (tmp_path / "failing.py").write_text("def main(args): raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(experiment, "PROGRAM", "failing")
    run = experiment.Run("digits", "plain", 0, (), (), Path("out"))
    assert "another process is at it" in (experiment.carry_out(run) or "")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    # A trial that is run again waits for what its first worker has left.
    assert "ended with 3" in (experiment.carry_out(run, waits=True) or "")


def test_a_run_that_failed_at_once_can_be_corrected(tmp_path: Path) -> None:
    mistaken, corrected = (
        experiment.Run("digits", "plain", 0, (), (f"model.lr={rate}",), tmp_path) for rate in ("fast", "1")
    )
    mistaken.folder.mkdir(parents=True)
    (mistaken.folder / "run.json").write_text(json.dumps(mistaken.identity))
    corrected.check()
    for learned in ("checkpoints/last.ckpt", "result.json"):
        file = corrected.folder / learned
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
        with pytest.raises(SystemExit, match=r"run\.json is of a run with other settings"):
            corrected.check()
        file.unlink()


def test_what_was_interrupted_while_checkpoints_were_written_begins_anew(tmp_path: Path) -> None:
    best, other, last = (tmp_path / name for name in ("epoch=1-step=34.ckpt", "epoch=2-step=51.ckpt", "last.ckpt"))

    def left(*files: Path) -> None:
        for file in (best, other, last):
            file.unlink(missing_ok=True)
        for file in files:
            torch.save({"callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_path": str(best)}}}, file)

    left(best, last)
    assert experiment.last_of(tmp_path) == last
    left(best, other, last)  # a better one was saved
    assert experiment.last_of(tmp_path) == last
    assert sorted(tmp_path.iterdir()) == [best, last]
    left(other, last)  # and the best that the last one knows removed
    assert experiment.last_of(tmp_path) is None
    assert not list(tmp_path.iterdir())
    left(best)  # the first, before there was a last one
    assert experiment.last_of(tmp_path) is None
    assert not list(tmp_path.iterdir())
    left(best, last)
    last.write_bytes(last.read_bytes()[:-100])
    assert experiment.last_of(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_grid_that_is_told_to_end_leaves_its_trial_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--rows", "digits", "--arms", "plain", "--seeds", "0", "1", "--out", str(tmp_path)]
    carried_out: list[tuple[str, bool]] = []

    def carry_out(run: Any, keep_checkpoints: bool, waits: bool) -> None:
        carried_out.append((str(run.folder.relative_to(run.out)), waits))
        if len(carried_out) == 1:
            raise SystemExit(143)
        leave_result(run)

    monkeypatch.setattr(grid_program, "carry_out", carry_out)
    with pytest.raises(SystemExit):
        grid_program.main(arguments)
    grid_program.main(arguments)
    first, second = (f"digits/plain/seed_{seed}" for seed in (0, 1))
    assert carried_out == [(first, False), (second, False), (first, True)]
    grid_program.main(arguments)
    assert len(carried_out) == 3
    # A run whose folder was removed is run again.
    shutil.rmtree(tmp_path / first)
    grid_program.main(arguments)
    assert carried_out[3:] == [(first, False)]


def leave_result(run: Any) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    result = {**run.identity, "val_loss": 0.1 + run.seed, "test_acc": 0.5, "seconds": 1.0, "arguments": ["here"]}
    (run.folder / "result.json").write_text(json.dumps(result))


def test_machines_that_share_a_storage_share_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    carried_out: list[str] = []

    def carry_out(run: Any, keep_checkpoints: bool, waits: bool) -> None:
        carried_out.append(str(run.folder.relative_to(run.out)))
        leave_result(run)

    monkeypatch.setattr(grid_program, "carry_out", carry_out)
    grid = ["--rows", "digits", "--arms", "plain", "--storage", str(tmp_path / "shared.journal"), "--seeds"]
    grid_program.main([*grid, "0", "1", "--out", "here"])
    grid_program.main([*grid, "1", "0", "--out", "there"])
    assert carried_out == ["digits/plain/seed_0", "digits/plain/seed_1"]
    assert "2 runs, 2 of them done before" in capsys.readouterr().out
    records = [Path(out, "results.jsonl").read_text() for out in ("here", "there")]
    assert records[0] == records[1]
    grid_program.main([*grid, "2", "--out", "there"])  # another grid
    assert carried_out[2:] == ["digits/plain/seed_2"]


def test_a_storage_that_cannot_be_used_is_said_before_the_first_run(tmp_path: Path) -> None:
    grid = ["--rows", "digits", "--arms", "plain", "--seeds", "0", "--out", str(tmp_path), "--jobs", "2"]
    with pytest.raises(SystemExit, match="SQLite takes one worker"):
        grid_program.main([*grid, "--storage", "sqlite:///grid.db"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_grid_that_is_told_to_end_ends_its_runs(number: signal.Signals, root: Path) -> None:
    settings = ("trainer.max_epochs=1000", "data.batch_size=8")
    process = subprocess.Popen(
        command(root, "--arms", "plain", "--seeds", "0", "1", settings=settings),
        start_new_session=True,  # so that a Ctrl-C reaches it alone
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which in the background is ignored
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    wait_for(root / "out/mnist_fc_1/plain/seed_0/checkpoints/last.ckpt", process)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert is_gone(process.pid)
    assert not (root / "out/mnist_fc_1/plain/seed_1/log.txt").exists()


def is_gone(group: int) -> bool:
    """Whether nothing is left of a group of processes, once its server has had time to see that the program is gone."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.02)


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
        env=ENVIRONMENT,
    )
    folder = root / "out/mnist_fc_1/ydrop/seed_0"
    wait_for(folder / "checkpoints/last.ckpt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not results(root)
    # Under other settings it would go on with what it has learned under these.
    assert "of a run with other settings" in run(root, *args, settings=("trainer.max_epochs=61",), rc=1)
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
    assert "1 of 2 runs are not done" in said
    assert "model.lr=fast" in said
    assert list(results(root)) == ["mnist_fc_1/plain_model.lr=0.01/seed_0"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--rows", "mnist_fc_9"), "mnist_fc_9"),
        (("--arms", "jump"), "jump"),
        (("--vary", "model.lr"), "model.lr"),
        (("--seeds", "0", "1", "0"), "is there twice"),
        (("--vary", "model.lr=1,1"), "is there twice"),
        (("--jobs", "0"), "'0' is not 1 or more"),
        (("--vary", "ydrop.elasticity=1e-3,1e-2", "--arms", "plain", "ydrop"), "changes nothing for plain"),
    ],
)
def test_what_cannot_be_run_is_refused(
    args: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid_program, "run_all", lambda *_: None)
    with pytest.raises(SystemExit):
        grid_program.main(["--rows", "mnist_fc_1", *args])
    assert says in capsys.readouterr().err


def test_values_are_taken_apart_at_their_own_commas() -> None:
    varied = grid_program.varied
    assert varied("model.hidden=[64],[64,64]") == ["model.hidden=[64]", "model.hidden=[64,64]"]
    assert varied("x=[[1,2],[3]],[[4]]") == ["x=[[1,2],[3]]", "x=[[4]]"]
    assert varied('x={"a":1,"b":[2,3]},0') == ['x={"a":1,"b":[2,3]}', "x=0"]


def test_a_grid_beside_another_says_what_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = experiment.Run("digits", "plain", 0, (), (), tmp_path)
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / "lock"), pytest.raises(SystemExit, match="1 of 1 runs are not done"):
        grid_program.main(["--rows", "digits", "--arms", "plain", "--seeds", "0", "--out", str(tmp_path)])
    assert f"{run.folder}: another process is at it" in capsys.readouterr().out
