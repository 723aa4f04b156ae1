"""Every precision of a Trainer; scores and probabilities are float32 in all of them."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import ConductanceDropout, YDrop, YDropCallback
from tests.callbacks.test_exchange import Ours
from tests.callbacks.test_ydrop import X, Y, trainer_of

DATA = DataLoader(TensorDataset(X, Y), batch_size=16)
ACTIVATIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.bfloat16,  # Lightning takes bf16-mixed instead on a CPU, and says so
}


class Seeing(Callback):
    """Looks at each batch, behind the callback under test."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.evaluated: set[torch.dtype] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if trainer.training:
                (self.dtypes if module.training else self.evaluated).add(args[0].dtype)

        for module in pl_module.modules():
            if isinstance(module, ConductanceDropout):
                module.register_forward_pre_hook(note)


@pytest.mark.parametrize("precision", list(ACTIVATIONS))
@pytest.mark.filterwarnings("ignore:You passed `.*precision='16-mixed'")
def test_phase_1_sees_what_training_sees_and_counts_in_float32(precision: Any) -> None:
    callback, seeing = YDropCallback(annealing_epochs=0, elasticity=0.01), Seeing()
    trainer_of(callback, seeing, precision=precision, max_epochs=5).fit(Ours(), DATA)
    assert seeing.dtypes == seeing.evaluated == {ACTIVATIONS[precision]}
    assert callback.engine is not None
    for name, layer in callback.engine.layers.items():
        assert {callback.engine.scores[name].dtype, layer.drop_prob.dtype, layer.mean_drop_prob.dtype} == {
            torch.float32
        }
        # Twenty steps of a hundredth of the way: in bfloat16 the mean would not have moved at all.
        assert ((layer.mean_drop_prob - 0.35).abs() > 1e-3).any()
    assert callback.engine.nonfinite == 0


def test_probabilities_are_the_same_in_single_and_double_precision() -> None:
    ends = []
    for precision in ("32-true", "64-true"):
        torch.manual_seed(0)
        net = Ours()
        callback = YDropCallback(annealing_epochs=0)
        trainer_of(callback, precision=precision, max_steps=1).fit(net, DATA)
        assert callback.engine is not None
        ends.append(callback.engine)
    for name, scores in ends[0].scores.items():
        assert torch.allclose(scores, ends[1].scores[name], atol=1e-5)
        assert torch.equal(ends[0].layers[name].drop_prob, ends[1].layers[name].drop_prob)


def test_half_precision_by_autocast() -> None:
    net = Ours().body
    engine = YDrop(net)
    with torch.autocast("cpu", dtype=torch.float16):
        engine.step(X, Y)
    plain = YDrop(net)
    plain.step(X, Y)
    for name, scores in engine.scores.items():
        assert scores.dtype == torch.float32
        assert torch.allclose(scores, plain.scores[name], atol=0.02)


class Overflowing(Ours):
    """Puts out infinities in one batch, behind the first of its layers."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[:4](x)
        if self.trainer.training and not self.training and self.trainer.global_step in self.bad:
            hidden = hidden * torch.tensor(float("inf"))
        logits: Tensor = self.body[4:](hidden)
        return logits


class Keeping(Callback):
    """Keeps every batch's probabilities."""

    def __init__(self) -> None:
        self.seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        layers = {name: pl_module.get_submodule(name) for name in ("body.1", "body.4")}
        self.seen.append({name: (each.drop_prob.clone(), each.mean_drop_prob.clone()) for name, each in layers.items()})


def test_scores_that_are_not_finite_change_nothing_and_are_counted(tmp_path: Any) -> None:
    callback, keeping = YDropCallback(annealing_epochs=0, elasticity=0.1), Keeping()
    trainer = trainer_of(callback, keeping, max_epochs=2, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1)
    with pytest.warns(RuntimeWarning, match=r"not finite 4 time\(s\) so far") as caught:
        trainer.fit(Overflowing({1, 3}), DATA)
    assert sum("not finite" in str(warning.message) for warning in caught) == 1
    for bad in (1, 3):
        for name, (drop_prob, mean) in keeping.seen[bad].items():
            assert torch.equal(drop_prob, keeping.seen[bad - 1][name][0])
            assert torch.equal(mean, keeping.seen[bad - 1][name][1])
            assert not torch.equal(mean, keeping.seen[bad + 1][name][1])
    assert callback.engine is not None
    assert callback.engine.nonfinite == 4  # two layers, twice
    assert trainer.logged_metrics["ydrop/nonfinite"] == 4


@pytest.mark.filterwarnings("ignore:Scores of Y-Drop")
def test_a_first_score_that_is_not_finite_leaves_the_initial_probability() -> None:
    callback, keeping = YDropCallback(annealing_epochs=0, initial_drop_prob=0.2), Keeping()
    trainer_of(callback, keeping, max_epochs=1).fit(Overflowing({0}), DATA)
    for drop_prob, mean in keeping.seen[0].values():
        assert (drop_prob == torch.tensor(0.2)).all()
        assert (mean == torch.tensor(0.2)).all()
