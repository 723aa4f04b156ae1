from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from lightning_ydrop import YDrop, layer_conductance, monte_carlo
from lightning_ydrop.analysis import mean_conductance, removal_curve
from tests.models.picture import assert_same_picture, identities_of, picture_of, surroundings
from tests.models.stateful import STATEFUL, build

# What is said of models so odd is right, and no matter here.
quiet = pytest.mark.filterwarnings(
    "ignore:monte_carlo was given", "ignore:Phase 1 raised", "ignore:The outputs of Net for", "ignore:All units of"
)
X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3


@pytest.fixture(autouse=True)
def _switches_as_they_were() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


def first_step(model: nn.Module) -> None:
    YDrop(model).step(X, Y)


def removal(model: nn.Module) -> None:
    removal_curve(model, [(X, Y)], layers="inner", fractions=(0, 0.5), repeats=1)


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "conductance": lambda model: layer_conductance(model, X, Y, n_steps=3),
    "several passes": lambda model: layer_conductance(model, X, Y, n_steps=3, max_rows=10),
    "first step": first_step,
    "mean": lambda model: mean_conductance(model, [(X, Y)], n_steps=3),
    "removal": removal,
    "monte carlo": lambda model: monte_carlo(model, X, 3),
}


@quiet
@pytest.mark.parametrize("fails", [False, True], ids=["", "raises"])
@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("kind", list(STATEFUL))
def test_a_model_is_given_back_as_it_was(kind: str, call: str, fails: bool) -> None:
    model = build(kind)
    model.fails = fails
    before, around, where = picture_of(model), surroundings(), identities_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="out of order"):
            CALLS[call](model)
    else:
        CALLS[call](model)
    if call == "monte carlo":
        around["torch"] = surroundings()["torch"]  # whence the masks come
    assert_same_picture(around, surroundings())
    assert identities_of(model) == where
    assert_same_picture(before, picture_of(model))


@quiet
@pytest.mark.parametrize("fails", [False, True], ids=["", "raises"])
@pytest.mark.parametrize("kind", list(STATEFUL))
def test_later_steps_give_a_model_back_as_it_was(kind: str, fails: bool) -> None:
    model = build(kind)
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    model.fails = fails
    before, around, where = picture_of(model), surroundings(), identities_of(model)
    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="out of order"):
                ydrop.step(X, Y)
        else:
            ydrop.step(X, Y)
    assert_same_picture(around, surroundings())
    assert identities_of(model) == where
    assert_same_picture(before, picture_of(model))
    assert ydrop.unguarded == []
