"""A long run with every feature on: nothing grows, and nothing is left behind."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_ydrop import ConductanceDropout, KeyAdapter, NegativeLoss, YDropCallback
from tests.callbacks.test_ydrop import trainer_of

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


class Endless(IterableDataset[dict[str, Tensor]]):
    """Tokens and labels without end."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        while True:
            ids = torch.randint(0, 11, (5,), generator=generator)
            yield {"tokens": ids, "label": ids.sum() % 3}


class Net(LightningModule):
    """A model of tokens, with dropout of torch's to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(tokens)).mean(1))
        self.log("norm", logits.detach().float().norm())
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["tokens"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Footprint(Callback):
    """Measures the process after 1,000 and after all steps."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, int, int]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step in (1000, 10_000):
            gc.collect()
            tensors = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
            self.seen[trainer.global_step] = memory, tensors, len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the footprint from /proc")
@pytest.mark.filterwarnings("ignore:.*does not have a length:UserWarning")
def test_ten_thousand_steps_hold_memory_flat(tmp_path: Path) -> None:
    net, footprint = Net(), Footprint()
    callback = YDropCallback(
        annealing_steps=2000, transition="linear", elasticity=0.01, every_n_batches=1, convert=True,
        adapter=KeyAdapter("tokens", "label"), objective=NegativeLoss(nn.CrossEntropyLoss(reduction="none")),
        interpolate_at="embedding",
    )  # fmt: skip
    trainer = trainer_of(
        callback, footprint, LearningRateMonitor(), ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1000),
        enable_checkpointing=True, logger=CSVLogger(tmp_path), precision="bf16-mixed", max_epochs=-1, max_steps=10_000,
        log_every_n_steps=50,
    )  # fmt: skip
    before = {name: len(module._forward_hooks) for name, module in net.named_modules()}
    trainer.fit(net, DataLoader(Endless(), batch_size=32))
    (memory, tensors, files), (memory_end, tensors_end, files_end) = footprint.seen[1000], footprint.seen[10_000]
    print(f"after 1,000 steps {memory / 2**20:.1f} MiB and {tensors} tensors, at the end "
          f"{memory_end / 2**20:.1f} MiB and {tensors_end}")  # fmt: skip
    assert memory_end - memory < 8 * 2**20
    assert tensors_end <= tensors
    assert files_end <= files
    assert {name: len(module._forward_hooks) for name, module in net.named_modules()} == before
    layers = [module for module in net.modules() if isinstance(module, ConductanceDropout)]
    assert len(layers) == 2
    assert not any(layer.active for layer in layers)
    assert "log" not in net.__dict__
    assert callback.engine is not None
    assert callback.engine.state_dict()["steps_taken"] == 9_999  # at the first step, the share of Y-Drop is 0
