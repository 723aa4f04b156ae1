"""A checkpoint of the last epoch, from which a fit goes on as if it had not been interrupted."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class LastEpoch(ModelCheckpoint):
    """Keeps the last epoch in last.ckpt, and in all checkpoints what Lightning leaves out of them.

    That is the random state of torch, and whether training was over. A fit that goes on from last.ckpt is bit for bit
    the one that was never interrupted (since Lightning 2.5.3; before, batches come in another order).

    Args:
        dirpath: Folder of last.ckpt.

    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(dirpath, "last", enable_version_counter=False)
        self._stopped = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it."""
        device = pl_module.device
        checkpoint["left_out"] = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "stopped": trainer.should_stop,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put it back, before the order of batches is drawn."""
        kept = checkpoint.get("left_out")
        if kept is None:
            return  # another program's
        self._stopped = kept["stopped"]
        if trainer.world_size > 1:
            return  # the state is that of the first rank, whose masks the others are not to have
        torch.set_rng_state(kept["cpu"])
        if kept["cuda"] is not None:
            torch.cuda.set_rng_state(kept["cuda"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train no more where it was over."""
        super().on_train_start(trainer, pl_module)
        if self._stopped:
            trainer.should_stop = True
