"""What the layers and names around a dropout say: the dimension of its units, and whether it follows a ReLU."""

import re
from bisect import bisect_left
from dataclasses import dataclass

from torch import nn

from lightning_ydrop.layers.kinds import CHANNEL_DROPOUTS, CONVERTED, OUR_DROPOUTS

FEATURES_LAST = (
    *(nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.Flatten),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
CHANNELS_SECOND = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
)
RELUS = (nn.ReLU, nn.ReLU6)
# The outputs of these layers are positive where their inputs are. After a ReLU, active units stay active.
KEEPING_ACTIVE = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, *CONVERTED, *OUR_DROPOUTS),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
# Names of a dropout of attention weights. It may also have a plain name, in a module whose class is called attention
# and which makes queries.
OF_ATTENTION = re.compile(r"(att|attn|attention)(_(weights?|probs?))?_?drop(out)?|drop(out)?_?(att|attn|attention)")
PLAIN_NAME = re.compile(r"drop(out)?(_layer)?")
OF_QUERIES = re.compile(r"(.*_)?w?(q|qk|qkv|query|queries)s?(_.*)?|linears")


@dataclass(eq=False)
class Place:
    """One name of a module in a model. A module at several places has several names.

    Attributes:
        name: As `named_modules` gives it, including what compilation adds.
        module: The module.
        called: Its name in the module that holds it.
        parent: The place of the module that holds it. None for the model itself.
        index: Position in the order of definition.
        end: Position after the last place inside this one.
        deciding: The layer that decides where units are here, and whether this place is "behind" or "before" that
            layer. None if no layer decides.

    """

    name: str
    module: nn.Module
    called: str = ""
    parent: "Place | None" = None
    index: int = 0
    end: int = 0
    deciding: tuple[nn.Module, str] | None = None

    @property
    def holder(self) -> nn.Module:
        """The module that holds this one."""
        assert self.parent is not None
        return self.parent.module


class Surroundings:
    """All places of a model and what is around them, found in one walk: time is linear in the number of places.

    The closest layer before a place in its container decides where units are. If none there does, the closest after it
    does, and if none there does either, the layers around the container.

    Attributes:
        places: In the order of definition.

    """

    def __init__(self, model: nn.Module) -> None:
        self.places: list[Place] = []
        self._ends: dict[int, tuple[nn.Module | None, nn.Module | None]] = {}
        # Where the modules are that hold no others and may change which units are active.
        self._changing: list[int] = []
        self._indices: dict[int, list[int]] = {}
        self._visit(Place("", model))

    def unit_dim_of(self, place: Place) -> tuple[int, str]:
        """Find the dimension of the units of a dropout, and say why it is that one."""
        if isinstance(place.module, CHANNEL_DROPOUTS):
            return 1, "its channels"
        if place.deciding is None:
            return -1, "with nothing around it that tells"
        layer, where = place.deciding
        return -1 if has_features_last(layer) else 1, f"{where} {type(layer).__name__}"

    def follows_relu(self, place: Place) -> bool:
        """Tell whether the inputs of a module are the outputs of a ReLU."""
        for position in range(bisect_left(self._changing, place.index) - 1, -1, -1):
            closest = self.places[self._changing[position]]
            if self._is_first_in_its_neighbour(closest, place):
                return isinstance(closest.module, RELUS)
        return False

    def _is_first_in_its_neighbour(self, closest: Place, place: Place) -> bool:
        """Tell whether a neighbour of `place` that holds `closest` does not hold the same module earlier too.

        A module that a neighbour holds several times counts at its first place there, as in `neighbour.modules()`.
        """
        indices = self._indices[id(closest.module)]
        earlier = bisect_left(indices, closest.index) - 1
        if earlier < 0:
            return True
        neighbour = closest
        while neighbour.parent is not None and neighbour.parent.end <= place.index:
            neighbour = neighbour.parent
        return indices[earlier] < neighbour.index

    def _visit(self, place: Place) -> None:
        """Add a place and all places inside it."""
        place.index = len(self.places)
        self.places.append(place)
        children = place.module._modules
        if all(child is None for child in children.values()) and not isinstance(place.module, KEEPING_ACTIVE):
            self._changing.append(place.index)
            self._indices.setdefault(id(place.module), []).append(place.index)
        ends = [self._ends_of(child) for child in children.values()]
        closest_after: list[nn.Module | None] = [None]
        for first, _ in reversed(ends[1:]):
            closest_after.append(closest_after[-1] if first is None else first)
        closest_before: nn.Module | None = None
        for (called, child), (_, last), after in zip(children.items(), ends, reversed(closest_after), strict=False):
            if child is not None:
                deciding = place.deciding
                if closest_before is not None:
                    deciding = closest_before, "behind"
                elif after is not None:
                    deciding = after, "before"
                name = f"{place.name}.{called}" if place.name else called
                self._visit(Place(name, child, called, place, deciding=deciding))
            closest_before = closest_before if last is None else last
        place.end = len(self.places)

    def _ends_of(self, module: nn.Module | None) -> tuple[nn.Module | None, nn.Module | None]:
        """Find the first and the last layer in a module that decide where units are, in the order of definition."""
        if module is None:
            return None, None
        if id(module) not in self._ends:
            first: nn.Module | None = None
            last: nn.Module | None = None
            if isinstance(module, FEATURES_LAST + CHANNELS_SECOND) or has_features_last(module):
                first = last = module
            else:
                for child in module._modules.values():
                    first_there, last_there = self._ends_of(child)
                    first = first_there if first is None else first
                    last = last if last_there is None else last_there
            self._ends[id(module)] = first, last
        return self._ends[id(module)]


def has_features_last(module: nn.Module) -> bool:
    """Tell from the kind of a layer whether the units of its output are the last dimension, instead of dimension 1."""
    kind = type(module).__name__
    # LayerNorm2d of torchvision and timm stands between convolutions. Patch embeddings convolve, then move the
    # features to the end.
    return (isinstance(module, FEATURES_LAST) and not kind.endswith("2d")) or "embed" in kind.lower()


def drops_attention_weights(holder: nn.Module, called: str) -> bool:
    """Tell from the name of a dropout in its holder, and from the holder, whether it drops attention weights."""
    if OF_ATTENTION.fullmatch(called.lower()):
        return True
    kind = type(holder).__name__.lower()
    return (
        PLAIN_NAME.fullmatch(called.lower()) is not None
        and ("attention" in kind or "attn" in kind)
        and any(OF_QUERIES.fullmatch(child) for child in holder._modules)
    )
