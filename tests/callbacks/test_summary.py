"""What the callback says in a fit: once what it read, and once that it takes over."""

import inspect
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop import (
    Buckets,
    ConductanceDropout,
    ConfigurationError,
    HalfNormalRate,
    Inverted,
    KeyAdapter,
    NoEffectWarning,
    OutputSum,
    YDropCallback,
)
from lightning_ydrop.importance.measures import Conductance


class Net(L.LightningModule):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(6, 8), ConductanceDropout(p), nn.ReLU()),
            *(nn.Linear(8, 10), ConductanceDropout(0.1), nn.ReLU(), nn.Linear(10, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch["image"] if isinstance(batch, dict) else batch[0]
        return self(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


X, Y = torch.randn(32, 6), torch.arange(32) % 3
PAIRS = [(X[:16], Y[:16]), (X[16:], Y[16:])]


def said_in_fit(
    caplog: pytest.LogCaptureFixture, data: Any, epochs: int = 3, net: Net | None = None, **arguments: Any
) -> list[str]:
    """Fit, and list what the callback says."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[YDropCallback(**arguments)],
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        trainer.fit(net or Net(), torch.utils.data.DataLoader(data, batch_size=None))
    return [record.message for record in caplog.records if "Y-Drop" in record.message]


def test_it_says_once_what_it_read_and_once_that_it_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    assert said_in_fit(caplog, PAIRS, annealing_epochs=1) == [
        "Y-Drop read the first batch: input (16, 6) from item 0; target (16,) from item 1, whole numbers; objective "
        "TargetLogit.\n"
        "  It measures the units of 2 layer(s), body.1 (8), body.4 (10), on 3 sample(s) of each batch, in 16 rows.\n"
        "  After 1 epoch(s) of ordinary dropout, p=0.5 becomes about 0.14 and 0.64 by importance, p=0.1 becomes about "
        "0.03 and 0.13 by importance. Validation accuracy may fall for some epochs then, less so with elasticity=0.1, "
        "transition='linear'.",
        "Epoch 1: Y-Drop takes over. p=0.5 becomes about 0.14 and 0.64 by importance, p=0.1 becomes about 0.03 and "
        "0.13 by importance.",
    ]


def test_without_annealing_it_speaks_once(caplog: pytest.LogCaptureFixture) -> None:
    (said,) = said_in_fit(caplog, PAIRS, annealing_epochs=0, buckets=Buckets())
    assert said.endswith("  From the first batch on, p=0.5 becomes about 0.14 and 0.64 by importance, p=0.1 becomes "
                         "about 0.14 and 0.64 by importance.")  # fmt: skip


def test_a_trial_run_says_that_it_skips_annealing(caplog: pytest.LogCaptureFixture) -> None:
    trainer = L.Trainer(accelerator="cpu", fast_dev_run=True, callbacks=[YDropCallback()], enable_progress_bar=False)
    with caplog.at_level(logging.INFO):
        trainer.fit(Net(), torch.utils.data.DataLoader(PAIRS, batch_size=None))  # type: ignore[arg-type]
    (said,) = (record.message for record in caplog.records if "Y-Drop" in record.message)
    assert "  fast_dev_run skips annealing: p=0.5 becomes" in said
    assert "may fall" not in said


def test_a_trainer_of_the_other_package_is_refused() -> None:
    Other = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})
    with pytest.raises(ConfigurationError, match="Write `import lightning as L`"):
        YDropCallback().setup(Other(), Net(), "fit")


def test_a_fit_that_is_resumed_after_annealing_goes_on(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    data: Any = torch.utils.data.DataLoader(PAIRS, batch_size=None)  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=2, callbacks=[YDropCallback(annealing_epochs=1)], **settings)
    trainer.fit(Net(), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO):
        caplog.clear()
        resumed = L.Trainer(max_epochs=3, callbacks=[YDropCallback(annealing_epochs=1)], **settings)
        resumed.fit(Net(), data, ckpt_path=tmp_path / "last.ckpt")
    (said,) = (record.message for record in caplog.records if "Y-Drop" in record.message)
    assert "  Y-Drop goes on after its annealing. p=0.5 becomes about 0.14" in said
    assert "ordinary dropout" not in said


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_conversion_does_not_announce_rates_that_the_callback_overrides(caplog: pytest.LogCaptureFixture) -> None:
    for buckets, is_announced in ((None, True), (Buckets(high=HalfNormalRate(0.3, 0.05, 0.5)), False)):
        net = Net()
        net.body[1] = nn.Dropout(0.5)
        with caplog.at_level(logging.INFO):
            said_in_fit(caplog, PAIRS, annealing_epochs=0, net=net, buckets=buckets, convert=True)
        (report,) = (record.message for record in caplog.records if "1 dropout layer(s) converted" in record.message)
        assert ("Y-Drop turns p=0.5" in report) is is_announced


@pytest.mark.parametrize(
    ("data", "arguments", "expected"),
    [
        (
            [X],
            {},
            "the batch itself; no target, so the outputs are summed; for an autoencoder pass objective=",
        ),
        (PAIRS, {"objective": OutputSum()}, "input (16, 6) from item 0; objective OutputSum, which needs no target."),
        (
            [{"image": X, "target": torch.rand(32, 3).softmax(1)}],
            {},
            "input (32, 6) from 'image'; target (32, 3) from 'target', numbers; objective TargetLogit.",
        ),
        (
            [{"image": X, "kind": Y, "target": X}],
            {"adapter": KeyAdapter("image", "kind")},
            "input (32, 6) from 'image'; target (32,) from 'kind', whole numbers; objective TargetLogit.",
        ),
        (
            [(X, Y)],
            {"annealing_epochs": None, "annealing_steps": 2, "transition": "linear"},
            "Over the first 2 optimiser step(s), in a line, p",
        ),
        ([(X, Y)], {"num_samples": 4, "quadrature": "trapezoid"}, "on 4 sample(s) of each batch, in 24 rows."),
    ],
)  # fmt: skip
def test_it_says_where_things_are(
    caplog: pytest.LogCaptureFixture, data: Any, arguments: dict[str, Any], expected: str
) -> None:
    said = said_in_fit(caplog, data, epochs=4, **({"annealing_epochs": 1} | arguments))
    assert expected in said[0]


def test_what_a_method_of_the_model_reads_is_described(caplog: pytest.LogCaptureFixture) -> None:
    class Own(Net):
        def ydrop_inputs(self, batch: Any) -> tuple[Tensor, Tensor]:
            return batch[0] + 1, batch[1]

    said = said_in_fit(caplog, PAIRS, annealing_epochs=0, net=Own())
    assert "read the first batch: input (16, 6); target (16,) from item 1" in said[0]


def test_many_layers_are_not_all_named(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    layers = [layer for _ in range(9) for layer in (nn.Linear(3, 3), ConductanceDropout())]
    net.body.extend(layers)
    said = said_in_fit(caplog, PAIRS, annealing_epochs=0, net=net)
    assert "of 11 layer(s), body.1 (8), body.4 (10), " in said[0]
    assert "body.18 (3), and 3 more, on 3" in said[0]


@pytest.mark.parametrize(
    ("arguments", "epochs", "lengths"),
    [
        ({"annealing_epochs": 3}, 2, "after 2 epoch(s), where annealing takes 3 epoch(s)"),
        ({"annealing_steps": 9}, 2, "after 4 optimiser step(s), where annealing takes 9 optimiser step(s)"),
    ],
)
def test_annealing_that_outlasts_training_is_told_with_both_lengths(
    caplog: pytest.LogCaptureFixture, arguments: dict[str, Any], epochs: int, lengths: str
) -> None:
    with pytest.warns(NoEffectWarning) as caught:
        said_in_fit(caplog, PAIRS, epochs, **arguments)
    (said,) = (str(each.message) for each in caught if each.category is NoEffectWarning)
    assert said == (
        f"Training is to end before the annealing of YDropCallback does, {lengths}: all of it is ordinary dropout. "
        "Train for longer, or pass a smaller annealing_epochs or annealing_steps."
    )


def test_a_callback_shows_what_was_chosen() -> None:
    assert repr(YDropCallback()) == "YDropCallback()"
    callback = YDropCallback(3, measure=Inverted(Conductance()), objective="binary", exclude="*.drop", convert=True)
    assert repr(callback) == (
        "YDropCallback(annealing_epochs=3, measure=Inverted(Conductance()), objective='binary', "
        "convert=True, exclude='*.drop')"
    )


def test_a_driven_layer_shows_its_rates() -> None:
    layer = ConductanceDropout(0.5)
    assert repr(layer) == "ConductanceDropout(p=0.5, unit_dim=1, elementwise=False)"
    layer.update(torch.tensor([0.1, 0.6, 0.125]), elasticity=0.5, initial_drop_prob=0.35)
    assert repr(layer) == (
        "ConductanceDropout(p=0.5, unit_dim=1, elementwise=False, driven: 3 units dropped at 0.10 to 0.60)"
    )
    layer.deactivate()
    assert "driven" not in repr(layer)


class WithCalls(Net):
    """Drops in its forward, in attention as it does in training mode alone, and inside an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop = 0.3
        self.lstm = nn.LSTM(6, 6, num_layers=2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.25, self.training)
        x = x + self.lstm(x.unsqueeze(1))[0].squeeze(1)
        token = x[:, None]
        x = F.scaled_dot_product_attention(token, token, token, dropout_p=0.3 if self.training else 0.0)[:, 0]
        return super().forward(x)


def test_dropout_without_a_layer_is_named_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    lines, first = inspect.getsourcelines(WithCalls.forward)
    calls = [first + index for index, line in enumerate(lines) if " F." in line]
    said, _ = said_in_fit(caplog, PAIRS, annealing_epochs=1, net=WithCalls())
    assert said.split("\n  ")[3:] == [
        f"It does not drive calls of functions, which drop as before: F.dropout (rate 0.25, {__file__}:{calls[0]}), "
        f"F.scaled_dot_product_attention (rate 0.3, {__file__}:{calls[1]}). For Y-Drop to drive one, "
        "write self.drop = nn.Dropout(p) in __init__, and self.drop(x) in forward. Attention weights have no units.",
        "It does not drive dropout inside lstm (LSTM, dropout=0.2). Place a dropout layer after one of these for "
        "Y-Drop to drive its units.",
    ]


def test_an_attention_that_drops_in_training_alone_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    class Attention(Net):
        def forward(self, x: Tensor) -> Tensor:
            token, rate = x[:, None], 0.4 if self.training else 0.0
            return super().forward(F.scaled_dot_product_attention(token, token, token, dropout_p=rate)[:, 0])

    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            token = x[:, None]
            return super().forward(F.scaled_dot_product_attention(token, token, token)[:, 0])

    said, _ = said_in_fit(caplog, PAIRS, annealing_epochs=1, net=Attention())
    assert "F.scaled_dot_product_attention (rate 0.4, " in said
    said, _ = said_in_fit(caplog, PAIRS, annealing_epochs=1, net=Plain())
    assert "F.scaled" not in said
