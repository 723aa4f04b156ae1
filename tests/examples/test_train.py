import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.datasets.mnist import read_image_file

from tests.examples.programs import ENVIRONMENT, EXAMPLES
from tests.sameness import assert_same

CONFIGS = EXAMPLES / "configs"
ARMS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base")


def run(*args: object) -> str:
    """Run a program of examples/ as its users do, and return all that it says."""
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, args)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def train(*args: object) -> str:
    return run("-m", "examples.train", "fit", f"--config={CONFIGS / 'base.yaml'}", *args)


def test_a_run_shows_its_progress_and_leaves_what_it_promises(tmp_path: Path) -> None:
    said = train(
        f"--config={CONFIGS / 'ydrop.yaml'}", "--trainer.max_epochs=4", "--model.hidden=[32,16]", "--model.lr=0.1",
        "--trainer.callbacks.init_args.annealing_epochs=1",
    )  # fmt: skip
    assert re.search("Epoch 3(: 100%|/3)", said)  # the plain bar, or the rich one where rich is installed
    assert "test_acc" in said
    (folder,) = (tmp_path / "runs/train").iterdir()
    assert list((folder / "checkpoints").glob("*.ckpt"))
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["val_acc"]]) == 4
    assert float(next(row["test_acc"] for row in rows if row["test_acc"])) > 0.5
    assert any(row["ydrop/network.2/top20_share"] for row in rows)
    with (folder / "conductance.csv").open() as file:
        units = list(csv.DictReader(file))
    assert len(units) == 32
    assert len([unit for unit in units if unit["network.4"]]) == 16


@pytest.fixture
def say(cli: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Give the program arguments with which it does not train, in this process, and return all that it says."""

    def said(*args: str) -> str:
        with pytest.raises((SystemExit, ValueError)) as caught:
            cli(["fit", f"--config={CONFIGS / 'base.yaml'}", *args])
        return "".join(capfd.readouterr()) + str(caught.value)

    return said


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_what_its_file_says(arm: str, say: Callable[..., str]) -> None:
    config = printed(say(f"--config={CONFIGS / f'{arm}.yaml'}", "--print_config=skip_default"))
    kinds = [callback["class_path"] for callback in config["trainer"].get("callbacks", [])]
    assert (config["early_stopping"]["monitor"], config["early_stopping"]["patience"]) == ("val_loss", 10)
    assert ("lightning_ydrop.YDropCallback" in kinds) == (arm in ("ydrop", "random", "shuffled", "inverted"))
    kinds_of_others = {"plain": "none", "dropout": "vanilla", "dropout_at_mean_rate": "vanilla", "jumpout": "jumpout"}
    expected = kinds_of_others.get(arm, "conductance")
    assert config.get("model", {}).get("init_args", {}).get("dropout", "none") == expected


def printed(said: str) -> Any:
    """Read a printed configuration."""
    return yaml.safe_load(said[said.index("seed_everything") :].removesuffix("0"))  # and the exit status


def test_what_the_callback_takes_can_be_read_and_set_on_the_command_line(say: Callable[..., str]) -> None:
    said = say("--trainer.callbacks.help=lightning_ydrop.YDropCallback")
    for argument in (
        "annealing_epochs",
        "elasticity",
        "buckets",
        "baseline",
        "quadrature",
        "measure",
        "seed",
    ):
        assert f"--trainer.callbacks.{argument}" in said.replace("init_args.", "")
    said = say(
        "--trainer.callbacks+=lightning_ydrop.YDropCallback", "--trainer.callbacks.buckets.strong_fraction=0.25",
        '--trainer.callbacks.measure={"class_path": "lightning_ydrop.Inverted", '
        '"init_args": {"measure": "lightning_ydrop.Conductance"}}', "--print_config",
    )  # fmt: skip
    callback = printed(said)["trainer"]["callbacks"][-1]
    assert callback["init_args"]["buckets"]["strong_fraction"] == 0.25
    assert callback["init_args"]["measure"]["class_path"].endswith("Inverted")


def test_a_wrong_setting_in_yaml_ends_before_training_with_its_message(say: Callable[..., str]) -> None:
    said = say("--trainer.callbacks+=lightning_ydrop.YDropCallback", "--trainer.callbacks.elasticity=1.5")
    assert "YDropCallback(elasticity=1.5) was given. `elasticity` is a number in [0, 1]." in said


def test_mnist_is_read_from_its_own_files(mnist_root: str) -> None:
    images = read_image_file(str(Path(mnist_root) / "MNIST/raw/train-images-idx3-ubyte"))
    assert images.shape == (60000, 28, 28)
    assert images.dtype == torch.uint8
    said = train(
        f"--config={EXAMPLES / 'paper/rows/mnist_fc_1.yaml'}", f"--config={CONFIGS / 'ydrop.yaml'}",
        f"--data.root={mnist_root}",
        "--trainer.max_epochs=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1",
        "--model.hidden=[8]",
    )  # fmt: skip
    assert "704/704" in said


def test_a_run_with_another_logger_is_tested(cli: Callable[..., Any], tmp_path: Path) -> None:
    ended = cli(
        [
            *("fit", f"--config={CONFIGS / 'base.yaml'}", "--model.hidden=[8]", "--trainer.max_epochs=1"),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
            *("--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path}"),
        ]
    )
    assert (Path(ended.trainer.log_dir) / "reached.json").exists()
    assert (Path(ended.trainer.log_dir) / "conductance.csv").exists()


class Ends(Callback):
    """Ends a run in its third epoch, as what kills it would."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (2, 3):
            raise EOFError


@pytest.mark.skipif(lightning.__version__ < "2.5.3", reason="there batches come in another order")
@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_run_that_was_interrupted_goes_on_as_the_uninterrupted_one(cli: Callable[..., Any], tmp_path: Path) -> None:
    def last_of(name: str, *others: str) -> Any:
        """Train, and give what is left: all but the names of files."""
        folder = tmp_path / name
        trainer = cli(
            [
                *("fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={CONFIGS / 'ydrop.yaml'}"),
                *("--model.hidden=[16]", "--model.lr=0.3", "--early_stopping.patience=3", "--data.train_fraction=0.3"),
                *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"),
                *(f"--trainer.logger.save_dir={folder}", f"--checkpoint.dirpath={folder / 'checkpoints'}", *others),
            ]
        ).trainer
        best, last = (torch.load(file) for file in sorted((folder / "checkpoints").glob("*.ckpt")))
        kept = [
            [each[key] for key in ("epoch", "state_dict", "optimizer_states", "exact_resume")] for each in (best, last)
        ]
        return [kept, *((Path(trainer.log_dir) / file).read_text() for file in ("reached.json", "conductance.csv"))]

    expected = last_of("uninterrupted")
    (_, (epoch, *_)), reached, _ = expected
    assert json.loads(reached)["epochs"] == epoch + 1
    assert 3 < epoch < 199  # it was early stopping that ended it
    with pytest.raises(EOFError):
        last_of("ended", f"--trainer.callbacks+={__name__}.Ends")
    going_on = f"--ckpt_path={tmp_path / 'ended/checkpoints/last.ckpt'}"
    assert_same(last_of("ended", going_on), expected)
    assert_same(last_of("ended", going_on), expected)  # as if it had ended in the test, behind the last epoch
