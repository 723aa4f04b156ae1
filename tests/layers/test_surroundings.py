"""What is found in one walk, against a slow search from each dropout outwards."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from lightning_ydrop.layers.surroundings import (
    CHANNELS_SECOND,
    FEATURES_LAST,
    KEEPING_ACTIVE,
    RELUS,
    Surroundings,
    has_features_last,
)


class PatchEmbed(nn.Sequential):
    """Decides for what it holds."""


LEAVES: list[Any] = [
    *(lambda: nn.Linear(2, 2), lambda: nn.Conv2d(2, 2, 1), nn.ReLU, nn.GELU, nn.Identity, nn.Flatten),
    *(nn.Dropout, nn.Dropout, nn.Dropout2d, lambda: nn.MaxPool2d(2), lambda: nn.LayerNorm(2), nn.Sequential),
]


def network(chance: random.Random, depth: int, made: list[nn.Module]) -> nn.Module:
    """Nest layers at random. Some stand at several places."""
    children: list[nn.Module] = []
    for _ in range(chance.randrange(6)):
        if made and chance.random() < 0.2:
            children.append(chance.choice(made))
        elif depth and chance.random() < 0.5:
            children.append(network(chance, depth - 1, made))
        else:
            children.append(chance.choice(LEAVES)())
            made.append(children[-1])
    holder: nn.Module = chance.choice([nn.Sequential, nn.Sequential, PatchEmbed])(*children)
    if chance.random() < 0.2:
        holder.register_module("none", None)
    made.append(holder)
    return holder


def around(model: nn.Module, name: str) -> Iterator[tuple[list[nn.Module], list[nn.Module]]]:
    """List what is before a module, the closest first, and what is after it, in its container and those around."""
    path = name.split(".")
    for depth in reversed(range(len(path))):
        siblings = list(model.get_submodule(".".join(path[:depth]))._modules.items())
        position = [called for called, _ in siblings].index(path[depth])
        before, after = siblings[:position][::-1], siblings[position + 1 :]
        yield [each for _, each in before if each is not None], [each for _, each in after if each is not None]


def deciding(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, FEATURES_LAST + CHANNELS_SECOND) or has_features_last(module):
        return [module]
    return [part for child in module._modules.values() if child is not None for part in deciding(child)]


def slow_unit_dim(model: nn.Module, name: str) -> tuple[int, str]:
    for before, after in around(model, name):
        for where, neighbours, closest in (("behind", before, -1), ("before", after, 0)):
            for found in filter(None, map(deciding, neighbours)):
                return -1 if has_features_last(found[closest]) else 1, f"{where} {type(found[closest]).__name__}"
    return -1, "with nothing around it that tells"


def slow_follows_relu(model: nn.Module, name: str) -> bool:
    for before, _ in around(model, name):
        for neighbour in before:
            for leaf in reversed([part for part in neighbour.modules() if not list(part.children())]):
                if not isinstance(leaf, KEEPING_ACTIVE):
                    return isinstance(leaf, RELUS)
    return False


@pytest.mark.parametrize("seed", range(150))
def test_one_walk_finds_what_a_search_from_each_place_finds(seed: int) -> None:
    model = network(random.Random(seed), 4, [])
    surroundings = Surroundings(model)
    names = list(model.named_modules(remove_duplicate=False))
    assert [(place.name, place.module) for place in surroundings.places] == names
    for place in surroundings.places[1:]:
        assert place.holder._modules[place.called] is place.module
        if type(place.module) is nn.Dropout:
            assert surroundings.unit_dim_of(place) == slow_unit_dim(model, place.name)
            assert surroundings.follows_relu(place) is slow_follows_relu(model, place.name)
