"""Run as every process of a distributed run: trains some cases, and writes what each rank ends with."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ydrop import (
    ConductanceDropout,
    ConductanceMonitor,
    ConfigurationError,
    DropoutDistillation,
    Jumpout,
    Measure,
    MonteCarloCallback,
    Request,
    YDrop,
    YDropCallback,
    layer_conductance,
)
from lightning_ydrop.analysis import ConductanceSpread, mean_conductance
from lightning_ydrop.importance.measures import Conductance
from lightning_ydrop.uncertainty import MonteCarlo, MonteCarloDivergence

STRATEGIES: dict[str, Callable[[int], Strategy]] = {
    "default": lambda n: DDPStrategy(process_group_backend="gloo"),
    "static_graph": lambda n: DDPStrategy(process_group_backend="gloo", static_graph=True),
    "find_unused_parameters": lambda n: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
    "gradient_as_bucket_view": lambda n: DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True),
    "no broadcast_buffers": lambda n: DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
    "fsdp2": lambda n: ModelParallelStrategy(n, 1, process_group_backend="gloo"),
}
if torch.__version__ < "2.7":
    del STRATEGIES["fsdp2"]  # there it asks for streams, which a CPU does not have


class Net(LightningModule):
    """A perceptron with BatchNorm, sharded where the strategy shards; its masks are kept for comparison."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(12, 16), norm or nn.BatchNorm1d(16), ConductanceDropout(), nn.ReLU(),
            nn.Linear(16, 10), ConductanceDropout(), nn.ReLU(), nn.Linear(10, 5),
        )  # fmt: skip
        self.dropped: Tensor | None = None

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.device_mesh is not None:
            for part in (self.body[0], self.body[4], self.body[7], self.body):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == 0:
            self.dropped = self.body[2](torch.ones(8, 16)) == 0
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Observing(YDropCallback):
    """Phase 1 runs, and its probabilities are not used."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self.engine is not None
        self.engine.deactivate()


class Measuring(Callback):
    """Conductance is measured before the model has run for the first time."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layer_conductance(pl_module, torch.ones(4, 12), 0)


class Seeing(Measure):
    """Conductance that keeps the samples that it was given last."""

    def score(self, phase1: Request) -> dict[str, Tensor]:
        self.inputs = phase1.inputs[0]
        return Conductance().score(phase1)


def fit(
    net: LightningModule, strategy: str, accumulate: int, callbacks: list[Callback], epochs: int = 4, **kwargs: Any
) -> Trainer:
    """Train on 13 batches for each rank and epoch, the last of them smaller than the others."""
    n = dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    rows = (16 * 12 + 5) * n
    data = TensorDataset(torch.randn(rows, 12, generator=generator), torch.arange(rows) % 5)
    trainer = Trainer(
        accelerator="cpu", devices=n, strategy=STRATEGIES[strategy](n), max_epochs=epochs, callbacks=callbacks,
        accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, DataLoader(data, batch_size=16), **kwargs)
    return trainer


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """Gather what is sharded."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def trained(strategy: str, accumulate: int, mode: str) -> dict[str, Any]:
    """Train one case, and give weights, probabilities, one mask and the last samples of this rank."""
    measure = Conductance() if mode == "compiled" else Seeing()
    callback = {"on": YDropCallback, "observe": Observing}.get(mode, YDropCallback)(
        0, elasticity=0.1, measure=measure, compile_phase1=mode == "compiled"
    )
    torch.manual_seed(5)
    net = Net()
    torch.manual_seed(10 + dist.get_rank())
    callbacks: dict[str, list[Callback]] = {"without": [], "measure": [Measuring()]}
    # The recorded graph, without torch's compiler, which takes seconds.
    with patch("lightning_ydrop.importance.compiled.compiled_graph", lambda graph, tensors: graph):
        fit(net, strategy, accumulate, callbacks.get(mode, [callback]))
    ended: dict[str, Any] = {"weights": whole(net.state_dict()), "mask": net.dropped}
    if callback.engine is not None:
        assert callback.engine.findings is not None
        assert (callback.engine.findings.plan.compiled is not None) == (mode == "compiled")
        ended["ydrop"] = callback.engine.state_dict()
        if isinstance(measure, Seeing):
            ended["samples"] = measure.inputs
    return ended


def resumed(strategy: str, folder: Path) -> list[dict[str, Any]]:
    """Train without and with an interruption at the end of the second epoch."""

    class Reseed(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            torch.manual_seed(10 * trainer.global_step + trainer.global_rank)

    def callbacks() -> list[Callback]:
        return [YDropCallback(1, elasticity=0.1), Reseed()]

    ends = []
    for stops in ((4,), (2, 4)):
        path: str | None = None
        for stop in stops:
            torch.manual_seed(5)
            # A checkpoint holds one rank's BatchNorm statistics, and others go on with theirs until the next forward.
            net = Net(nn.LayerNorm(16))
            trainer = fit(net, strategy, 1, callbacks(), stop, ckpt_path=path)
            path = str(folder / f"{strategy}.ckpt")
            if stop == 2:
                trainer.save_checkpoint(path)
        callback = trainer.callbacks[0]  # type: ignore[attr-defined]
        ends.append({"weights": whole(net.state_dict()), "ydrop": callback.engine.state_dict()})
    return ends


def perceptron(width: int = 8) -> nn.Sequential:
    """Build the same small network on every rank."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, width), ConductanceDropout(), nn.Tanh(), nn.Linear(width, 5))


class Sometimes(nn.Module):
    """Calls its second layer for large inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more = perceptron(), nn.Sequential(nn.Linear(5, 5), ConductanceDropout())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return self.more(logits) if bool(x.abs().max() > 100) else logits


def engine_cases() -> dict[str, Any]:
    """Run the engine in plain processes."""
    rank = dist.get_rank()
    x, y = torch.randn(16, 12, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 5
    mine = slice(None, 10) if rank == 0 else slice(10, None)
    engine = YDrop(perceptron(), num_samples=16)
    engine.step(x[mine], y[mine])
    cases: dict[str, Any] = {"halves": engine.scores["1"]}
    spread = ConductanceSpread(12)
    spread.update(x[mine])
    cases["spread"] = spread.compute()["mean"]
    sometimes = YDrop(Sometimes())
    for _ in range(2):
        sometimes.step(x + 200 * rank, y)
    cases["sometimes"] = sometimes.state_dict()
    seldom = YDrop(Sometimes())
    seldom.step(x + 200, y)
    cases["called by none"] = [seldom.state_dict()["layers"]["more.1"]]
    seldom.step(x, y)
    cases["called by none"] += [seldom.state_dict()["layers"]["more.1"]]
    cases["called by none, nonfinite"] = int(seldom.nonfinite)
    empty = YDrop(perceptron(), num_samples=16)
    for samples in (slice(0), slice(10 * (1 - rank)), slice(0)):  # of no rank, of the first alone, of no rank
        empty.step(x[samples], y[samples])
    cases["without samples"] = empty.state_dict()
    for name, model, labels in (
        ("labels", perceptron(), y + 5 * rank),
        ("widths", perceptron(8 + rank), y),
    ):
        try:
            YDrop(model).step(x, labels)
        except ConfigurationError as error:
            cases[name] = str(error)
    STRATEGIES["tensor parallel"] = lambda n: ModelParallelStrategy(1, n, process_group_backend="gloo")
    try:
        fit(Net(), "tensor parallel", 1, [YDropCallback()])
    except ConfigurationError as error:
        cases["tensor parallel"] = str(error)
    return cases


def distilled(with_jumpout: bool) -> dict[str, Any]:
    """Distil a network with BatchNorm into one alike, or one with Jumpout, each rank with its own part of the data."""
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), Jumpout(), nn.Dropout(), nn.Linear(16, 5))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), Jumpout(), nn.Linear(16, 5)) if with_jumpout else None
    distillation = DropoutDistillation(teacher, student=student, num_masks=2)
    untaught = {name: value.clone() for name, value in distillation.student.named_parameters()}
    rows = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(rows), 8)
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=STRATEGIES["default"](0),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(distillation, data, data)
    # Each rank adds half of the samples, with averages that differ.
    average = MonteCarlo(torch.eye(2)[[dist.get_rank()]], 1)
    divergence = MonteCarloDivergence()
    divergence.update(torch.tensor([[0.0, 1.0]]), average)
    return {
        "student": dict(distillation.student.named_parameters()),
        "untaught": untaught,
        "logged": trainer.callback_metrics,
        "teacher": dict(distillation.teacher.state_dict()),
        "before": before,
        "divergence": divergence.compute(),
    }


class Uneven(IterableDataset[tuple[Tensor, Tensor]]):
    """Two batches for the first rank, and none for the others."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if dist.get_rank() == 0:
            for seed in (1, 2):
                generator = torch.Generator().manual_seed(seed)
                yield torch.randn(8, 12, generator=generator), torch.randint(0, 5, (8,), generator=generator)


class Validated(Net):
    """The same, validated."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])


def monitored() -> dict[str, Any]:
    """Monitor validation where all ranks but one have nothing to measure, and measure on one rank alone."""
    torch.manual_seed(5)
    net = Validated()
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=STRATEGIES["default"](0),
        callbacks=[ConductanceMonitor(figures=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*sync_dist.*")
        trainer.validate(net, DataLoader(Uneven(), batch_size=None), verbose=False)
    alone = {}
    if dist.get_rank() == 0:
        alone = mean_conductance(net, Uneven(), n_steps=10, quadrature="trapezoid")
    return {"logged": trainer.callback_metrics, "alone": alone}


class Tested(LightningModule):
    """A classifier with dropout, the same on all ranks, whose test knows nothing of masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))
        self.accuracy = MulticlassAccuracy(5, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.log("loss", nn.functional.cross_entropy(logits, batch[1]), sync_dist=True)


def averaged() -> dict[str, Any]:
    """Predict and test with averages over masks, of the same samples on every rank and of other ones."""
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    net, n = Tested(), dist.get_world_size()

    def trainer_of(**settings: Any) -> Trainer:
        return Trainer(
            accelerator="cpu", devices=n, strategy=STRATEGIES["default"](n), logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[MonteCarloCallback(20, max_rows=1, **settings)],
        )  # fmt: skip

    alike = DataLoader(TensorDataset(x[:1].expand(32, -1)), batch_size=8)
    ended: dict[str, Any] = {}
    for name, seed in (("one seed", None), ("seeds of their own", 3)):
        seed_everything(7, verbose=False)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = trainer_of(seed=seed).predict(net, alike)
        assert found is not None
        ended[name] = torch.cat([each.probabilities for each in found])  # type: ignore[union-attr]
        ended[f"{name}, warnings"] = [str(each.message) for each in warned if "masks" in str(each.message)]
    trainer = trainer_of(seed=3)
    trainer.test(net, DataLoader(TensorDataset(x, torch.arange(32) % 5), batch_size=8), verbose=False)
    ended["logged"] = trainer.callback_metrics
    found = trainer_of(seed=3).predict(net, DataLoader(TensorDataset(x), batch_size=8))
    assert found is not None
    ended["probabilities"] = torch.cat([each.probabilities for each in found])  # type: ignore[union-attr]
    del os.environ["PL_GLOBAL_SEED"]
    return ended


def main(folder: Path, *cases: str) -> None:
    """Run the cases, each named as strategy/accumulation/mode or otherwise."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases:
        if case == "engine":
            ended: Any = engine_cases()
        elif case == "monitored":
            ended = monitored()
        elif case == "averaged":
            ended = averaged()
        elif case.startswith("distilled"):
            ended = distilled(with_jumpout=case == "distilled/jumpout")
        elif case.startswith("resumed/"):
            ended = resumed(case.split("/")[1], folder)
        else:
            strategy, accumulate, mode = case.split("/")
            ended = trained(strategy, int(accumulate), mode)
        torch.save(ended, folder / f"{case.replace('/', ' ')} {dist.get_rank()}.pt")
    dist.barrier()  # no rank takes the group down under another that still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
