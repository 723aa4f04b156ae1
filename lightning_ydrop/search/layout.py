"""The modules of a model by name, and what each is for patterns."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_ydrop.layers.kinds import CONVERTED, OUR_DROPOUTS
from lightning_ydrop.models.modules import kind_of

# The name under which a masked module holds its pattern.
CHILD = "pattern_dropout"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Forwards that call what a container holds, or that are not there.
READY = (nn.Module.forward, *(container.forward for container in CONTAINERS))
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
ORDINARY = (*CONVERTED, *OUR_DROPOUTS)
# Squeeze-and-excitation and its like weigh channels by what they make of a pooled map: nothing to mask a part of.
GATE = re.compile(
    r"(effective)?squeeze_?(and_?)?exc\w*|(effective)?se(layer|module|block|unit)?(2d)?|cbam\w*|eca(module|layer)?"
)


class Layout:
    """The modules of a model by name, in the order of definition, each once.

    Names are without what compilation adds. Metrics, which may hold networks of their own, and patterns that stand on
    masked modules are left out.

    Attributes:
        model: The model.
        modules: By name.
        holders: By name: the module that holds it, and its name there.
        shared: The modules that are held more than once, by id.

    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.holders: dict[str, tuple[nn.Module, str]] = {}
        self.shared: set[int] = set()
        self._seen: set[int] = set()
        self._visit("", model)
        self._positions = {name: position for position, name in enumerate(self.modules)}
        self._gates = [name for name in self.modules if name and self._is_gate(name)]

    def __getitem__(self, name: str) -> nn.Module:
        return self.modules[name]

    def inside(self, name: str) -> list[str]:
        """Name the modules in a module, itself included, in the order of definition."""
        return [each for each in self.modules if is_inside(each, name)]

    def holder_of(self, name: str) -> str:
        """Name the module that holds another one."""
        return name.rpartition(".")[0]

    def kind(self, name: str) -> str:
        """Name the class of a module."""
        return type(self.modules[name]).__name__

    def position(self, name: str) -> int:
        """Say where a module stands in the order of definition."""
        return self._positions[name]

    def ends_at(self, name: str) -> int:
        """Say where the last module in a module stands."""
        return max(self._positions[each] for each in self.inside(name))

    def is_in_gate(self, name: str) -> bool:
        """Tell whether a module is a part of something that weighs channels, such as squeeze-and-excitation."""
        return any(is_inside(name, gate) for gate in self._gates)

    def is_in_embedding(self, name: str) -> bool:
        """Tell whether a module is a part of something that embeds, such as patches of an image."""
        holders = [outer for outer in self.modules if outer != name and is_inside(name, outer)]
        return any("embed" in self.kind(outer).lower() for outer in holders)

    def batch_norms(self, names: Iterable[str]) -> list[str]:
        """List the batch norms of maps among some modules."""
        return [name for name in names if is_batch_norm(self.modules[name]) and not self.is_in_gate(name)]

    def convolutions(self, names: Iterable[str]) -> list[str]:
        """List the convolutions of maps among some modules."""
        return [name for name in names if isinstance(self.modules[name], CONVOLUTIONS) and not self.is_in_gate(name)]

    def maskable(self, names: Iterable[str]) -> list[str]:
        """List the batch norms among some modules, or their convolutions where there is no batch norm."""
        names = list(names)
        return self.batch_norms(names) or self.convolutions(names)

    def _visit(self, name: str, module: nn.Module) -> None:
        self._seen.add(id(module))
        self.modules[name] = module
        for called, child in module._modules.items():
            if child is None or called == CHILD or _is_metric(child):
                continue
            if id(child) in self._seen:
                self.shared.add(id(child))
                continue
            # What is compiled stands for what compiles it.
            inner = name if called == "_orig_mod" else f"{name}.{called}" if name else called
            self.holders[inner] = (module, called)
            self._visit(inner, child)

    def _is_gate(self, name: str) -> bool:
        called = name.rpartition(".")[2].lower()
        return GATE.fullmatch(self.kind(name).lower()) is not None or called in ("se", "se_module", "se_layer")


def is_inside(name: str, outer: str) -> bool:
    """Tell from two names whether one module is the other or lies in it."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises maps (B, C, H, W) over a batch."""
    kind = type(module).__name__.lower()
    known = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
    return known or ("batchnorm" in kind and "2d" in kind)


def is_ordinary_dropout(module: object) -> bool:
    """Tell whether a module is a dropout layer that a pattern takes the place of."""
    return isinstance(module, ORDINARY)


def stride_of(module: nn.Module) -> int:
    """Say by how much a convolution or pooling makes a map smaller: 1 for any other module."""
    pools = "pool" in type(module).__name__.lower() and "adaptive" not in type(module).__name__.lower()
    stride: Any = getattr(module, "stride", 1) if pools or isinstance(module, CONVOLUTIONS) else 1
    steps = stride if isinstance(stride, (tuple, list)) else (stride,)
    return max((step for step in steps if isinstance(step, int)), default=1)


def width_of(module: nn.Module) -> int:
    """Give the number of channels that a norm or a convolution puts out."""
    return int(getattr(module, "num_features", getattr(module, "out_channels", 0)))


def _is_metric(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == "torchmetrics" for base in type(module).__mro__)


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether somebody wrote the forward of a module: it is neither torch's own nor a container's."""
    kind = kind_of(module)
    if kind.script or kind.of_torch or type(module).__module__.startswith("torch._dynamo"):
        return False
    return getattr(type(module), "forward", None) not in READY
