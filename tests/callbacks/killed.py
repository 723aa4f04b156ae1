"""A training run that can be killed, and go on; run as a program, it kills itself."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_ydrop import YDropCallback
from tests.networks import perceptron

BATCHES = 6  # in an epoch
EPOCHS = 4


class Resumable:
    """Batches in another order in each epoch, which go on where they stopped."""

    def __init__(self) -> None:
        self.given = 0
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(BATCHES, 16, 12, generator=generator), torch.arange(BATCHES * 16).view(-1, 16) % 5

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(BATCHES, generator=torch.Generator().manual_seed(self.given // BATCHES)).tolist()
        for position in range(self.given % BATCHES, BATCHES):
            self.given += 1
            yield self.x[order[position]], self.y[order[position]]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Net(LightningModule):
    """A perceptron with momentum and a schedule of its learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Reseed(Callback):
    """Gives torch's random stream the state that it would have had: what is under test is what ours keeps."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


class Kill(Callback):
    """Kills the process before a batch, or at the end of an epoch."""

    def __init__(self, epoch: int, batch: int | None) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch, None) == (self.epoch, self.batch):
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    folder: Path, settings: dict[str, Any], accumulate: int, *others: Callback, ckpt_path: str | None = None
) -> tuple[Trainer, Net, YDropCallback]:
    """Train, with a checkpoint after every step."""
    torch.manual_seed(1)
    net, ydrop = Net(), YDropCallback(elasticity=0.1, **settings)
    trainer = Trainer(
        accelerator="cpu", max_epochs=EPOCHS, accumulate_grad_batches=accumulate, log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1), enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ydrop, Reseed(), ModelCheckpoint(folder, "last", every_n_train_steps=1), *others],
    )  # fmt: skip
    trainer.fit(net, Resumable(), ckpt_path=ckpt_path)
    return trainer, net, ydrop


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), Kill(*json.loads(sys.argv[4])))
