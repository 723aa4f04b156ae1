"""What a single process says to itself; of several, tests/distributed tells."""

import pytest
import torch

from lightning_ydrop import ConfigurationError
from lightning_ydrop.importance import ranks
from lightning_ydrop.importance.ranks import (
    add_over_ranks,
    agree_on_units,
    averages,
    gather_over_ranks,
    rank,
    world_size,
)

CPU = torch.device("cpu")


def test_alone_there_is_one_rank_and_nothing_is_exchanged() -> None:
    assert (world_size(), rank()) == (1, 0)
    values = torch.arange(3.0)
    add_over_ranks(values)
    assert values.tolist() == [0, 1, 2]
    assert gather_over_ranks({"a": 1}) == [{"a": 1}]


def test_units_are_those_that_were_found() -> None:
    assert agree_on_units({"a": 3}, None, False) == {"a": 3}
    assert agree_on_units({}, None, True) is None
    raised = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        agree_on_units({}, raised, False)
    assert caught.value is raised


@pytest.mark.parametrize(
    ("others", "text"),
    [
        (({"a": 4}, "", False), r"Rank 1 cannot run phase 1: {'a': 4}"),
        (({}, "it is broken", False), "Rank 1 cannot run phase 1: it is broken"),
    ],
)
def test_what_another_rank_finds_wrong_is_raised(others: object, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gather_over_ranks", lambda report: [report, others])
    with pytest.raises(ConfigurationError, match=text):
        agree_on_units({"a": 3}, None, False)


def test_units_of_other_ranks_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gather_over_ranks", lambda report: [report, ({"b": 4}, "", False), ({}, "", True)])
    assert agree_on_units({"a": 3}, None, False) == {"a": 3, "b": 4}
    assert agree_on_units({}, None, True) == {"b": 4}


def test_layers_of_one_width_are_averaged_together_in_the_order_of_the_model() -> None:
    scores = {name: torch.randn(5, width) for name, width in (("c", 3), ("a", 3), ("b", 4))}
    found = list(averages(scores, {"a": 3, "b": 4, "c": 3, "missing": 3}, CPU))
    assert [names for names, _ in found] == [["a", "c"], ["b"]]
    for names, means in found:
        assert means.dtype == torch.float32
        for name, mean in zip(names, means, strict=True):
            assert torch.allclose(mean, scores[name].mean(0))


def test_half_precision_is_averaged_in_single() -> None:
    scores = {"a": torch.full((4096, 2), 60_000.0, dtype=torch.float16)}
    ((_, means),) = averages(scores, {"a": 2}, CPU)
    assert torch.equal(means, scores["a"][:1].float())
