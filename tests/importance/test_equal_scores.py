import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, NoEffectWarning, YDrop
from lightning_ydrop.importance.equal_scores import warn_of_equal_scores
from tests.networks import perceptron

X, Y = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 5
IDS = torch.arange(16 * 6).reshape(16, 6) % 9


@contextmanager
def told(*texts: str) -> Iterator[None]:
    """Warn in these words, once for each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) == len(texts)
    for warning, text in zip(caught, texts, strict=True):
        assert warning.category is NoEffectWarning
        assert text in str(warning.message)


def test_a_head_that_starts_at_zero_is_named() -> None:
    model = perceptron()
    nn.init.zeros_(model[6].weight)  # type: ignore[arg-type]
    engine = YDrop(model)
    with told(
        "All units of '1', '4' have the same score in the first batch, since the output is the same for all samples: "
        "the weights of '6' are all 0. Scores differ as soon as training has moved these weights;"
    ):
        engine.step(X, Y)
    nn.init.normal_(model[6].weight)  # type: ignore[arg-type]
    engine.step(X, Y)
    assert all(layer.active and layer.drop_prob.std() > 0 for layer in engine.layers.values())


def test_an_output_that_is_the_same_for_other_reasons_is_not_its_fault() -> None:
    model = perceptron()
    for parameter in model[:6].parameters():
        nn.init.constant_(parameter, -1.0)  # all ReLUs are off
    with told("'1', '4' have the same score in the first batch: units that do not differ are ranked by their position"):
        YDrop(model).step(X.abs(), Y)


class Tokens(nn.Module):
    """A network on embeddings with a dropout among them, like BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.body = Embeddings(), perceptron()

    def forward(self, ids: Tensor) -> Any:
        return self.body(self.embeddings(ids).mean(1))


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.words = nn.Embedding(6, 12), nn.Embedding(9, 12)
        self.drop = ConductanceDropout(unit_dim=-1)

    def forward(self, ids: Tensor) -> Any:
        return self.drop(self.words(ids) + self.positions.weight)


def test_a_layer_inside_the_module_that_paths_run_through_is_named() -> None:
    with told(
        "All units of 'embeddings.drop' have the same score in the first batch, since paths start at the outputs of "
        "'embeddings', inside or before which these layers run. Their probabilities stay at the start. Name a module "
        "that runs before them, such as interpolate_at='embeddings.words', or leave them out of the conversion"
    ):
        YDrop(Tokens(), interpolate_at="embeddings").step(IDS, Y)
    YDrop(Tokens(), interpolate_at="embeddings.words").step(IDS, Y)


def test_few_of_many_layers_are_listed() -> None:
    scores = {str(index): torch.zeros(2, 3) for index in range(9)} | {
        "other": torch.rand(2, 3),
        "one": torch.ones(2, 1),
    }
    with told("All units of '0', '1', '2' and 6 more have the same score in the first batch: units that do not differ"):
        warn_of_equal_scores(nn.Identity(), scores, torch.rand(4, 3), None, ())
    with told("All units of '0', '2', '3' and 4 more have", "All units of '1', '8' have"):
        warn_of_equal_scores(nn.Identity(), scores, torch.rand(4, 3), "body", set("0234567"))


def test_nothing_is_told_where_scores_differ() -> None:
    with told():
        warn_of_equal_scores(nn.Identity(), {"a": torch.rand(2, 3)}, torch.zeros(4, 3), "body", {"a"})
