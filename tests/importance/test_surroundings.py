"""Where units are taken for what they are not, and one layer stands for several, the dry run says so."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, OutputSum, YDrop, convert_dropout

F = nn.functional


def stepped(model: nn.Module, x: Tensor, **settings: Any) -> YDrop:
    engine = YDrop(model, objective=OutputSum(), **settings)
    engine.step(x)
    return engine


def pooled(*layers: nn.Module) -> nn.Sequential:
    """The layers, and logits of what they put out."""
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("layers", "shape", "unit_dim", "suggested"),
    [
        ([nn.Linear(4, 6), ConductanceDropout()], (8, 5, 4), 1, -1),
        ([nn.LayerNorm(4), ConductanceDropout()], (8, 5, 4), 1, -1),
        ([nn.Linear(4, 6), nn.ReLU(), ConductanceDropout()], (8, 5, 4), 1, -1),
        ([nn.Linear(4, 6), ConductanceDropout(unit_dim=2)], (8, 5, 7, 4), 2, -1),
        ([nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), ConductanceDropout()], (8, 5, 4), 1, -1),
        ([nn.Conv1d(4, 6, 3), ConductanceDropout(unit_dim=-1)], (8, 4, 9), -1, 1),
        ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), ConductanceDropout(unit_dim=2)], (8, 4, 9, 9), 2, 1),
    ],
)
def test_positions_that_are_taken_for_units_are_told_with_the_unit_dim_to_pass(
    layers: list[nn.Module], shape: tuple[int, ...], unit_dim: int, suggested: int
) -> None:
    model = pooled(*layers)
    model(torch.randn(shape))
    name = str(len(layers) - 1)
    with pytest.warns(UserWarning, match=f"The layer '{name}' \\(unit_dim={unit_dim}\\) takes the") as caught:
        stepped(model, torch.randn(shape))
    assert len(caught) == 1
    assert str(caught[0].message).endswith(f"Pass ConductanceDropout(unit_dim={suggested}).")
    layers[-1].unit_dim = suggested  # type: ignore[assignment]
    stepped(model, torch.randn(shape))  # warnings are errors


class Called(nn.Module):
    """Layers of a dictionary, called by a function."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.call = nn.ModuleDict(layers), forward

    def forward(self, x: Tensor) -> Any:
        return self.call(x, **dict(self.layers.items()))


def cell_loop(x: Tensor, cell: nn.Module, drop: nn.Module, head: nn.Module) -> Any:
    hidden, total = x.new_zeros(len(x), 6), torch.zeros(())
    for step in range(x.shape[1]):
        hidden = cell(x[:, step], hidden)
        total = total + head(drop(hidden)).tanh()
    return total


def transposed(x: Tensor, first: nn.Module, drop: nn.Module, head: nn.Module) -> Any:
    return head(drop(first(x).transpose(1, 2)).mean(2))  # features in dimension 1, after a linear layer


def many_samples(x: Tensor, first: nn.Module, drop: nn.Module, head: nn.Module) -> Any:
    hidden = first(x).relu()
    return sum(head(drop(hidden)).tanh() for _ in range(5))


def weights_of_one(x: Tensor, first: nn.Module, drop: nn.Module, head: nn.Module) -> Any:
    for _ in range(3):
        x = drop(first(x)).tanh()
    return head(x)


def two_views(x: Tensor, first: nn.Module, drop: nn.Module, head: nn.Module) -> Any:
    return head(drop(first(x))) - head(drop(first(-x)))


def channels_of_tokens(x: Tensor, first: nn.Module, drop: nn.Module, head: nn.Module) -> Any:
    hidden = first(x)
    return head(drop(hidden.unflatten(1, (5, 1)).permute(0, 3, 1, 2)).mean((2, 3)))


SOUND: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "a loop over a cell": (
        Called(cell_loop, cell=nn.GRUCell(4, 6), drop=ConductanceDropout(), head=nn.Linear(6, 3)),
        (8, 5, 4),
    ),
    "features moved to the channels": (
        Called(transposed, first=nn.Linear(4, 6), drop=ConductanceDropout(), head=nn.Linear(6, 3)),
        (8, 5, 4),
    ),
    "multi-sample dropout": (
        Called(many_samples, first=nn.Linear(4, 6), drop=ConductanceDropout(), head=nn.Linear(6, 6)),
        (8, 4),
    ),
    "a layer that runs again and again": (
        Called(weights_of_one, first=nn.Linear(4, 4), drop=ConductanceDropout(), head=nn.Linear(4, 3)),
        (8, 4),
    ),
    "two views": (
        Called(two_views, first=nn.Linear(4, 6), drop=ConductanceDropout(), head=nn.Linear(6, 3)),
        (8, 4),
    ),
    "tokens laid out as an image": (
        Called(channels_of_tokens, first=nn.Linear(4, 6), drop=ConductanceDropout(), head=nn.Linear(6, 3)),
        (8, 5, 4),
    ),
    "two dimensions": (nn.Sequential(nn.Linear(4, 6), ConductanceDropout(unit_dim=-1), nn.Linear(6, 3)), (8, 4)),
    "channels": (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), ConductanceDropout(), nn.Flatten(), nn.Linear(6, 3)),
        (8, 4, 4, 4),
    ),
    "nothing that tells in front": (nn.Sequential(ConductanceDropout(), nn.Flatten(), nn.Linear(20, 3)), (8, 5, 4)),
}


@pytest.mark.parametrize("kind", list(SOUND))
def test_sound_uses_are_not_warned_of(kind: str) -> None:
    model, shape = SOUND[kind]
    stepped(model, torch.randn(shape))  # warnings are errors


def one_for_two(x: Tensor, first: nn.Module, second: nn.Module, drop: nn.Module, head: nn.Module) -> Any:
    return head(drop(second(drop(first(x).relu())).relu()))


def built(drop: nn.Module) -> Called:
    return Called(one_for_two, first=nn.Linear(4, 6), second=nn.Linear(6, 6), drop=drop, head=nn.Linear(6, 3))


def test_one_instance_behind_several_layers_is_told() -> None:
    text = r"The layer 'layers.drop' is one instance that stands after 2 layers \(Linear, Linear\)"
    with pytest.warns(UserWarning, match=text) as caught:
        stepped(built(ConductanceDropout()), torch.randn(8, 4))
    assert len(caught) == 1
    assert str(caught[0].message).endswith("Make a dropout layer for each place.")


def test_of_a_converted_layer_the_log_tells(caplog: pytest.LogCaptureFixture) -> None:
    model = built(nn.Dropout())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_dropout(model)
        with caplog.at_level(logging.WARNING, "lightning_ydrop"):
            stepped(model, torch.randn(8, 4))
    assert "one instance that stands after 2 layers" in caplog.text


def test_converted_layers_know_their_units() -> None:
    model = pooled(nn.Linear(4, 6), nn.Dropout())
    model(torch.randn(8, 5, 4))
    convert_dropout(model)
    assert stepped(model, torch.randn(8, 5, 4)).scores["1"].shape == (6,)


def test_hooks_are_gone_afterwards() -> None:
    model = built(ConductanceDropout())
    with pytest.warns(UserWarning, match="one instance"):
        stepped(model, torch.randn(8, 4))
    assert not any(module._forward_hooks for module in model.modules())
