"""A fit that is interrupted and resumed is bit for bit the one that was not."""

import csv
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)
from torchmetrics.classification import MulticlassAccuracy

from lightning_ydrop import ConfigurationError, ExactResume, YDropCallback
from lightning_ydrop.callbacks.random_state import random_state, set_random_state
from tests.sameness import assert_same

BATCHES, EPOCHS = 5, 3  # the last batch of an epoch is smaller

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Draws from all random streams for each sample."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(36, 12, generator=generator), torch.arange(36) % 5

    def __len__(self) -> int:
        return 36

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(12) + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002
        return self.x[index] + noise, self.y[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples in an order that is drawn, of a number that is not told."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Augmented()
        yield from (data[index] for index in torch.randperm(36).tolist())


class Batches:
    """Batches without a DataLoader."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.ones(8, 12), torch.arange(8) % 5)] * BATCHES)


class Net(LightningModule):
    """A perceptron with dropout, momentum, metrics, and hooks that draw."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5))
        self.accuracy = MulticlassAccuracy(5)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)

    def on_train_start(self) -> None:
        torch.rand(3)

    def on_train_epoch_start(self) -> None:
        torch.rand(2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("highest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Keep(Callback):
    """Keeps a copy of the checkpoint after each step, and after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.current_epoch}.ckpt")


def shuffled(workers: int = 0, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers, **settings)


def with_generator() -> DataLoader[Any]:
    return shuffled(generator=torch.Generator().manual_seed(5))


class Ordered(Sampler[int]):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return 36

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(36, generator=self.rng).tolist()


def with_a_sampler() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=8, sampler=Ordered())


def with_a_sampler_of_batches() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_sampler=BatchSampler(Ordered(), 8, drop_last=False))


def weighted() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=8, sampler=WeightedRandomSampler([1.0 + i for i in range(36)], 36))


def with_replacement() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=8, sampler=RandomSampler(range(36), replacement=True))


def streamed() -> DataLoader[Any]:
    return DataLoader(Stream(), batch_size=8)


def several() -> dict[str, DataLoader[Any]]:
    return {"long": shuffled(), "short": DataLoader(Augmented(), batch_size=12, shuffle=True)}


class OfStreams(Net):
    """Draws nothing before the first batch of an epoch, for which Lightning asks early."""

    def on_train_epoch_start(self) -> None:
        pass


class WithData(Net):
    """Has a loader of its own."""

    def train_dataloader(self) -> DataLoader[Any]:
        return shuffled()


class Pairs(Net):
    """Takes a batch from each of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        long, short = batch["long"], batch["short"]
        return super().training_step((torch.cat([long[0], short[0]]), torch.cat([long[1], short[1]])), batch_idx)

    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs | {"batch_size": 8})


def fit(
    folder: Path, data: Callable[[], Any], *callbacks: Callback, seed: int, net: type[Net] = Net, **settings: Any
) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, str]]]:
    """Train, and give all that it has come to and what was logged, by step."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    path, shares = settings.pop("ckpt_path", None), settings.pop("validates_on_the_same", False)
    model, loader, logger = net(), data(), CSVLogger(folder, name="", version="")
    chosen: dict[str, Any] = (
        {"accelerator": "cpu", "max_epochs": EPOCHS, "log_every_n_steps": 1, "logger": logger,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "callbacks": [ExactResume(), *callbacks]} | settings
    )  # fmt: skip
    trainer = Trainer(**chosen)
    held_out = loader if shares else DataLoader(Augmented(), batch_size=18)
    trainer.fit(model, loader, held_out, ckpt_path=path and str(path))
    if not (folder / "metrics.csv").exists():
        return {"weights": model.state_dict()}, {}
    with (folder / "metrics.csv").open() as file:
        logged = {
            (row["step"], "epoch" if row["loss_step"] == "" else "step"): {
                key: value for key, value in row.items() if value
            }
            for row in csv.DictReader(file)
        }
    ended = {"weights": model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}
    random_numbers = random_state(torch.device("cpu"))
    return ended | {"random": [torch.rand(2), random_numbers["python"], random_numbers["numpy"][1]]}, logged


# Which loader, whether with Y-Drop, and from which checkpoints the fit is resumed.
CASES: dict[str, tuple[Callable[[], Any], bool, list[str]]] = {
    "shuffled": (shuffled, False, ["step-1", "step-2", "epoch-0", "step-7", "epoch-1", "step-14"]),
    "with Y-Drop": (shuffled, True, ["step-2", "epoch-0", "step-8", "epoch-1"]),
    "two workers": (partial(shuffled, 2), False, ["step-2", "epoch-0"]),
    "two workers, with Y-Drop": (partial(shuffled, 2), True, ["step-8", "epoch-1"]),
    "a generator of its own": (with_generator, False, ["step-2", "epoch-0", "step-8"]),
    "a sampler with a generator": (with_a_sampler, False, ["step-2", "epoch-0", "step-8"]),
    "within a sampler of batches": (with_a_sampler_of_batches, False, ["step-2", "epoch-0", "step-8"]),
    "weighted": (weighted, False, ["step-7"]),
    "with replacement": (with_replacement, False, ["step-7"]),
    "of unknown length": (streamed, False, ["step-2", "epoch-0", "step-8"]),
    "two loaders": (several, False, ["step-2", "step-4", "epoch-0", "step-8"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_fit_is_the_uninterrupted_one(case: str, tmp_path: Path) -> None:
    data, has_ydrop, places = CASES[case]
    net = {several: Pairs, streamed: OfStreams}.get(data, Net)

    def others() -> list[Callback]:
        return [YDropCallback(annealing_epochs=1, convert=True)] if has_ydrop else []

    expected, expected_rows = fit(tmp_path / "whole", data, *others(), Keep(tmp_path), seed=1, net=net)
    if data is streamed and lightning.__version__ < "2.5.3":
        places = [place for place in places if not place.startswith("epoch")]  # there it begins the next epoch twice
    for place in places:
        folder = tmp_path / "resumed"
        shutil.rmtree(folder, ignore_errors=True)
        ended, rows = fit(folder, data, *others(), seed=2, net=net, ckpt_path=tmp_path / f"{place}.ckpt")
        assert_same(ended, expected)
        assert rows
        assert rows == {key: expected_rows[key] for key in rows}
        assert (str(EPOCHS * BATCHES - 1), "epoch") in rows


def test_without_it_a_resumed_fit_is_another(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path / "whole", shuffled, Keep(tmp_path), seed=1)
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        ended, _ = fit(tmp_path / "b", shuffled, seed=2, callbacks=[], ckpt_path=tmp_path / "step-7.ckpt")
    assert not torch.equal(ended["weights"]["body.0.weight"], expected["weights"]["body.0.weight"])


def test_validation_within_an_epoch_and_accumulated_gradients(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / f"validated-{trainer.global_step}.ckpt")

    settings: dict[str, Any] = {"val_check_interval": 2, "accumulate_grad_batches": 2}
    expected, _ = fit(tmp_path / "whole", shuffled, Saves(), seed=1, **settings)
    ended, _ = fit(tmp_path / "b", shuffled, seed=2, ckpt_path=tmp_path / "validated-4.ckpt", **settings)
    assert_same(ended["weights"], expected["weights"])
    with pytest.warns(UserWarning, match="between two optimiser steps, while gradients accumulate"):
        fit(tmp_path / "c", shuffled, Keep(tmp_path), seed=1, **settings)


def test_a_validation_within_an_epoch_that_lightning_leaves_out_is_said(tmp_path: Path) -> None:
    fit(tmp_path / "whole", shuffled, Keep(tmp_path), seed=1, val_check_interval=2)
    with pytest.warns(UserWarning, match="a batch that validation or the epoch's end follows"):
        fit(tmp_path / "b", shuffled, seed=2, ckpt_path=tmp_path / "step-2.ckpt", val_check_interval=2)


@pytest.mark.filterwarnings("ignore:.*shuffling enabled")
def test_a_loader_may_serve_validation_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"val_check_interval": 2, "validates_on_the_same": True}
    expected, _ = fit(tmp_path / "whole", shuffled, Keep(tmp_path), seed=1, **settings)
    ended, _ = fit(tmp_path / "b", shuffled, seed=2, ckpt_path=tmp_path / "step-3.ckpt", **settings)
    assert_same(ended, expected)


def test_model_checkpoints_hold_it_and_a_fit_that_was_over_stays_over(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_last=True, save_top_k=-1)
        return [EarlyStopping("val_loss", patience=1, min_delta=10.0), saving]

    settings: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 6}
    expected, rows = fit(tmp_path / "whole", shuffled, *callbacks(), seed=1, **settings)
    assert max(int(row["epoch"]) for row in rows.values()) == 1
    (place,) = (tmp_path / "kept").glob("*step=8.ckpt")
    ended, _ = fit(tmp_path / "b", shuffled, *callbacks(), seed=2, ckpt_path=place, **settings)
    assert_same(ended, expected)

    class Over(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1
            trainer.save_checkpoint(tmp_path / "over.ckpt")

    expected, _ = fit(tmp_path / "c", shuffled, Over(), seed=1)
    ended, _ = fit(tmp_path / "d", shuffled, seed=2, ckpt_path=tmp_path / "over.ckpt")
    assert_same(ended["weights"], expected["weights"])


def test_a_checkpoint_of_the_end_of_a_short_fit_goes_on(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path / "whole", shuffled, seed=1, max_steps=10, max_epochs=-1)

    class After(Callback):
        def teardown(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    fit(tmp_path / "part", shuffled, After(), seed=1, max_steps=7, max_epochs=-1)
    ended, _ = fit(tmp_path / "b", shuffled, seed=2, ckpt_path=tmp_path / "after.ckpt", max_steps=10, max_epochs=-1)
    assert_same(ended["weights"], expected["weights"])


@pytest.mark.parametrize("ends_by", ["itself", "an error"])
def test_loaders_are_given_back(ends_by: str, tmp_path: Path) -> None:
    class Raises(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            assert type(loader) is not DataLoader
            if ends_by != "itself":
                raise KeyError("ends here")

    loader = shuffled()
    before = dict(vars(loader))
    with suppress(KeyError):
        fit(tmp_path, lambda: loader, Raises(), seed=1)
    assert type(loader) is DataLoader
    assert vars(loader).keys() == before.keys()


def test_what_cannot_be_restored_is_refused_or_said(tmp_path: Path) -> None:
    fit(tmp_path / "whole", shuffled, Keep(tmp_path), seed=1)
    with pytest.warns(UserWarning, match="a batch that validation or the epoch's end follows, and before that"):
        fit(tmp_path / "last", shuffled, seed=1, ckpt_path=tmp_path / "step-5.ckpt")
    batches = Batches()
    fit(tmp_path / "a", lambda: batches, seed=1, ckpt_path=tmp_path / "epoch-0.ckpt")
    with pytest.raises(ConfigurationError, match="after 2 batches of an epoch, and the training data is Batches"):
        fit(tmp_path / "b", lambda: batches, seed=1, ckpt_path=tmp_path / "step-7.ckpt")
    again: dict[str, Any] = {"seed": 1, "reload_dataloaders_every_n_epochs": 1, "net": WithData}
    (tmp_path / "reloaded").mkdir()
    with pytest.warns(UserWarning, match=r"given to a Trainer\(reload_dataloaders_every_n_epochs=1\)"):
        fit(tmp_path / "c", lambda: None, Keep(tmp_path / "reloaded"), **again)
    with pytest.raises(ConfigurationError, match="after 2 batches of an epoch, and the training data is DataLoader"):
        fit(tmp_path / "g", shuffled, seed=1, ckpt_path=tmp_path / "reloaded/step-7.ckpt")
    with pytest.warns(UserWarning, match="can't restore the random state of persistent workers"):
        fit(tmp_path / "d", lambda: shuffled(1, persistent_workers=True), seed=1, max_steps=1)
    content = torch.load(tmp_path / "step-7.ckpt")
    content["exact_resume"]["ranks"] *= 2
    torch.save(content, tmp_path / "two.ckpt")
    with pytest.raises(ConfigurationError, match=r"saved by 2 process\(es\), and this fit has 1"):
        fit(tmp_path / "e", shuffled, seed=1, ckpt_path=tmp_path / "two.ckpt")
    del content["exact_resume"]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match="holds no state of ExactResume|your dataloader is not resumable") as caught:
        fit(tmp_path / "f", shuffled, seed=1, ckpt_path=tmp_path / "other.ckpt")
    assert sum("holds no state of ExactResume" in str(each.message) for each in caught) == 1


def test_several_are_refused() -> None:
    trainer = Trainer(max_epochs=1, callbacks=[ExactResume(), ExactResume()], logger=False, enable_checkpointing=False)
    loader = shuffled()
    with pytest.raises(ConfigurationError, match=r"several ExactResume callbacks\. .* Leave the others out\."):
        trainer.fit(Net(), loader, DataLoader(Augmented(), 9))
    assert type(loader) is DataLoader
    assert "_followed_by" not in vars(loader)


def test_the_random_state_can_be_loaded_safely(tmp_path: Path) -> None:
    own = torch.Generator()
    torch.save(random_state(torch.device("cpu"), [own]), tmp_path / "state")

    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand((), generator=own))]  # noqa: NPY002

    before = drawn()
    set_random_state(torch.load(tmp_path / "state", weights_only=True), torch.device("cpu"), [own])
    assert drawn() == before
