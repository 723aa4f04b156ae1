"""The rate of a dropout layer of any kind: read, set, and given back."""

from torch import nn

from lightning_ydrop.layers.conductance_dropout import ConductanceDropout
from lightning_ydrop.layers.jumpout import Jumpout
from lightning_ydrop.layers.kinds import TORCH_DROPOUTS, WITH_A_DROPOUT, drops
from lightning_ydrop.layers.pattern_dropout import PatternDropout


def has_rate(module: nn.Module) -> bool:
    """Tell whether a module has a rate that `RatedLayer` can set.

    Attention and recurrent layers with rate 0 count as layers without dropout. So does a pattern that drops nothing.
    """
    if isinstance(module, (*WITH_A_DROPOUT, PatternDropout)):
        return drops(module)
    return isinstance(module, (*TORCH_DROPOUTS, ConductanceDropout, Jumpout))


class RatedLayer:
    """A layer that drops, and the rate that it had when this object was made.

    The rate is `p` of torch's dropout layers and of ConductanceDropout, `p_max` of Jumpout, `dropout` of attention and
    recurrent layers, and of a PatternDropout the rate of its pattern times `progress`.

    Args:
        name: Its name in the model.
        layer: The layer, one for which `has_rate` is true.

    Attributes:
        own: The rate that it had, in [0, 1].

    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name = name
        self.layer = layer
        if isinstance(layer, Jumpout):
            names = ["p_max", "p_min"]
        elif isinstance(layer, PatternDropout):
            names = ["progress"]
        else:
            names = ["dropout" if isinstance(layer, WITH_A_DROPOUT) else "p"]
        self._values = {each: getattr(layer, each) for each in names}
        self.own = float(layer.pattern.rate if isinstance(layer, PatternDropout) else self._values[names[0]])

    @property
    def most(self) -> float:
        """The highest rate that can be set: a pattern can't drop more than its own rate."""
        return self.own if isinstance(self.layer, PatternDropout) else 1.0

    def set(self, rate: float) -> None:
        """Set the rate. The `p_min` of a Jumpout is never above it.

        Args:
            rate: The rate, in [0, `most`].

        """
        if isinstance(self.layer, Jumpout):
            self._write("p_max", rate)
            self._write("p_min", min(self._values["p_min"], rate))
        elif isinstance(self.layer, PatternDropout):
            self._write("progress", rate / self.own)
        else:
            (name,) = self._values
            self._write(name, rate)

    def give_back(self) -> None:
        """Set what the layer had."""
        for name, value in self._values.items():
            self._write(name, value)

    def _write(self, name: str, value: float) -> None:
        if getattr(self.layer, name) != value:  # setting an attribute of a module is slow
            setattr(self.layer, name, value)
