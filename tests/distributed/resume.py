"""A run on two ranks with random streams of their own: `python -m tests.distributed.resume FOLDER PLACE`."""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from lightning_ydrop import ExactResume
from tests.callbacks.test_exact_resume import Keep, Net, shuffled

PLACES = ["step-2", "epoch-0", "step-4"]  # an epoch has three steps


class OwnStreams(Callback):
    """Seeds each rank with a number of its own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, *args: Any) -> None:
        seed = 10 * self.seed + trainer.global_rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002


def train(seed: int, *callbacks: Callback, ckpt_path: str | None = None) -> tuple[Trainer, Net]:
    """Train on two ranks."""
    torch.manual_seed(seed)
    net = Net()
    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[OwnStreams(seed), ExactResume(), *callbacks],
    )  # fmt: skip
    trainer.fit(net, shuffled(), ckpt_path=ckpt_path)
    return trainer, net


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, place = Path(sys.argv[1]), sys.argv[2]
    trainer, net = train(1, Keep(folder)) if place == "whole" else train(2, ckpt_path=str(folder / f"{place}.ckpt"))
    if trainer.is_global_zero:
        torch.save(net.state_dict(), folder / f"{place}.pt")
