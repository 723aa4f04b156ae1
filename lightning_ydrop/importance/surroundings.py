"""Which layer each dropout follows when the model runs, and whether its `unit_dim` can be right."""

import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.surroundings import CHANNELS_SECOND, FEATURES_LAST, has_features_last

LOGGER = logging.getLogger(__name__)

# Layers that show in which dimension features are.
TELLING = tuple(kind for kind in FEATURES_LAST + CHANNELS_SECOND if kind is not nn.Flatten)


class _Standing(NamedTuple):
    """A call of a layer: the shape of its input, and the last module before it that shows where features are."""

    given: "weakref.ref[Tensor]"
    shape: torch.Size
    behind: nn.Module
    is_laid_out_alike: bool


class Surroundings:
    """Which modules run before each call of some layers.

    Args:
        modules: The modules of the model.
        layers: The layers, by name.

    """

    def __init__(self, modules: Iterable[nn.Module], layers: Mapping[str, nn.Module]) -> None:
        self._modules = list(modules)
        self.calls: dict[str, list[_Standing]] = {}
        self._names = {id(layer): name for name, layer in layers.items()}
        self._last: tuple[nn.Module, torch.Size, tuple[int, ...]] | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch while a model runs."""
        # Not one hook for all modules: torch.compile warns where there is any.
        watched = [module for module in self._modules if id(module) in self._names or isinstance(module, TELLING)]
        handles = [module.register_forward_hook(self._see) for module in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        given = args[0] if args else None
        if name is not None and self._last is not None and isinstance(given, Tensor):
            behind, *layout = self._last
            calls = self.calls.setdefault(name, [])
            # Once more on the same features, as in multi-sample dropout: whatever has run since, it is the same place.
            if not any(call.given() is given for call in calls):
                calls.append(
                    _Standing(weakref.ref(given), given.shape, behind, layout == [given.shape, given.stride()])
                )
        elif isinstance(module, TELLING):
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor):
                self._last = (module, first.shape, first.stride())


def warn_of_units(layers: Mapping[str, ConductanceDropout], surroundings: Surroundings) -> None:
    """Warn where positions are taken for units, and where one instance follows several layers."""
    for name, calls in surroundings.calls.items():
        layer = layers[name]
        for _, shape, behind, is_laid_out_alike in calls:
            dims = len(shape)
            # If the shape or the strides have changed in between, dimensions may have moved: nothing is known.
            if dims < 3 or not is_laid_out_alike or layer.replaced:
                continue
            expected = dims - 1 if has_features_last(behind) else 1
            if layer.unit_dim % dims != expected:
                suggested = -1 if has_features_last(behind) else 1
                warnings.warn(
                    f"The layer {name!r} (unit_dim={layer.unit_dim}) takes the {shape[layer.unit_dim]} entries of "
                    f"dimension {layer.unit_dim} for units, of {tuple(shape)} after {type(behind).__name__}, whose "
                    f"features are dimension {suggested}. "
                    "Positions are no units: which of them matter changes from sample to sample. "
                    f"Pass ConductanceDropout(unit_dim={suggested}).",
                    UserWarning,
                    stacklevel=5,
                )
                break
        standing = {id(call.behind): type(call.behind).__name__ for call in calls}
        if len(standing) > 1:
            text = (
                f"The layer {name!r} is one instance that stands after {len(standing)} layers "
                f"({', '.join(standing.values())}): these share one vector of rates, by the sum of their scores, "
                "though unit 0 of one is not unit 0 of the next. "
                "Make a dropout layer for each place."
            )
            if layer.replaced:  # nobody has put it there for Y-Drop
                LOGGER.warning(text)
            else:
                warnings.warn(text, UserWarning, stacklevel=5)
