"""What makes a unit important: strategies that a YAML file can name."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.attribution import Quadrature, sum_to_units
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.phase1.attribution import conductance
from lightning_ydrop.phase1.objectives import Target, target_output
from lightning_ydrop.phase1.recording import borrowed, recording


@dataclass(frozen=True)
class Phase1:
    """All that a measure may use to score the units in one phase 1.

    Attributes:
        model: The model, called as `model(*inputs)`.
        layers: The layers to score, by name.
        inputs: The samples drawn from the batch, each (B_c, *).
        target: Their class index (B_c,), soft labels (B_c, C), or None for the sum of the outputs.
        starts: For each input the baseline, (1, *), or (B_c, *) where the samples do not share one.
        n_steps: Steps on the path from the baseline to each sample.
        quadrature: Where on each step the gradient is taken.
        generator: On the CPU, the same on every rank and after a restart: the only source of chance for a measure.

    """

    model: nn.Module
    layers: Mapping[str, ConductanceDropout]
    inputs: tuple[Tensor, ...]
    target: Target
    starts: tuple[Tensor, ...]
    n_steps: int
    quadrature: Quadrature
    generator: torch.Generator


class Measure(ABC):
    """The importance of units. Subclass it, and name the subclass in Python or YAML.

    Example:
        >>> class Depth(Measure):
        ...     def score(self, phase1):
        ...         return {name: torch.arange(8.0).expand(1, 8) for name in phase1.layers}

    """

    @abstractmethod
    def score(self, phase1: Phase1) -> dict[str, Tensor]:
        """Score the units of every layer.

        It runs with the model as the user left it, and leaves it so: `borrowed` and `recording` help with that. It
        reads no value from the device, which would make the host wait.

        Returns:
            For each layer by name a tensor (N, U) of any real numbers, higher for units to be dropped more often; the
            engine averages over N (Eq. 4, arXiv 2409.09088). A layer that is left out keeps its state.

        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Conductance(Measure):
    """The paper's measure: how much of the change of the output flows through each unit (Eq. 2, arXiv 2409.09088)."""

    def score(self, phase1: Phase1) -> dict[str, Tensor]:
        """Measure all layers in one forward and one backward pass."""
        return conductance(
            phase1.model,
            phase1.layers,
            phase1.inputs,
            phase1.target,
            starts=phase1.starts,
            n_steps=phase1.n_steps,
            quadrature=phase1.quadrature,
        )


class RandomImportance(Measure):
    """A control: every unit's score is a fresh standard normal number, so that only the rates are Y-Drop's."""

    def score(self, phase1: Phase1) -> dict[str, Tensor]:
        """Draw scores, after one forward pass to see how many units there are."""
        with borrowed(phase1.model, phase1.inputs[0].device), recording(phase1.layers) as tape, torch.no_grad():
            phase1.model(*phase1.inputs)
        scores = {}
        for name, calls in tape.items():
            num_units = calls[0].shape[phase1.layers[name].unit_dim]
            drawn = torch.randn(1, num_units, generator=phase1.generator)
            scores[name] = drawn.to(calls[0].device, non_blocking=True)
        return scores


class Inverted(Measure):
    """A control: the ranking of another measure upside down, so that the units that matter least are dropped most.

    Args:
        measure: The measure whose scores are negated.

    Raises:
        ConfigurationError: If it is no measure.

    """

    def __init__(self, measure: Measure) -> None:
        check_measure("Inverted", measure)
        self.measure = measure

    def score(self, phase1: Phase1) -> dict[str, Tensor]:
        """Negate the scores of the wrapped measure."""
        return {name: -scores for name, scores in self.measure.score(phase1).items()}

    def __repr__(self) -> str:
        return f"Inverted({self.measure!r})"


class CaptumMeasure(Measure):
    """Any of captum's layer attributions, by name: one or more passes for each layer, so slower than `Conductance`.

    Each is taken at the layer's output, with F as the model's output, and given as much of phase 1 as it takes: the
    baseline, the number of steps on an equally spaced path. Captum rounds its path to float32. All of captum's are here
    but LayerLRP, which cannot be taken at a dropout layer.

    Args:
        attribution: Name of a class of `captum.attr`, such as "InternalInfluence", "LayerConductance",
            "LayerGradientXActivation" or "LayerDeepLift".
        arguments: More keyword arguments for its `attribute` method, or other values for those set here.

    Raises:
        ConfigurationError: If captum has no such layer attribution.

    """

    def __init__(self, attribution: str = "InternalInfluence", arguments: dict[str, Any] | None = None) -> None:
        _captum_attribution(attribution)
        self.attribution = attribution
        self.arguments = dict(arguments or {})

    def score(self, phase1: Phase1) -> dict[str, Tensor]:
        """Attribute each layer in turn."""
        attribution = _captum_attribution(self.attribution)
        takes = inspect.signature(attribution.attribute).parameters
        offered = {
            "baselines": tuple(start.expand_as(item) for start, item in zip(phase1.starts, phase1.inputs, strict=True)),
            "additional_forward_args": () if phase1.target is None else (phase1.target,),
            "n_steps": phase1.n_steps,
            "method": "riemann_trapezoid",
            "attr_dim_summation": False,
        }
        arguments = {name: value for name, value in offered.items() if name in takes} | self.arguments
        objective = _RowObjective(phase1.model, takes_target=phase1.target is not None)
        scores = {}
        with borrowed(objective, phase1.inputs[0].device):
            for name, layer in phase1.layers.items():
                attributed = attribution(objective, layer).attribute(phase1.inputs, **arguments)
                scores[name] = sum_to_units(attributed.detach(), layer.unit_dim)
        return scores

    def __repr__(self) -> str:
        return f"CaptumMeasure({self.attribution!r})"


class _RowObjective(nn.Module):
    """A model that returns F for each row. The target comes last among its inputs: captum repeats it with them."""

    def __init__(self, model: nn.Module, *, takes_target: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_target = takes_target

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.takes_target:
            return target_output(self.model(*inputs[:-1]), inputs[-1])
        return target_output(self.model(*inputs), None)


def check_measure(owner: str, measure: object) -> None:
    """Refuse what is no measure.

    Raises:
        ConfigurationError: If it is not.

    """
    if not isinstance(measure, Measure):
        raise ConfigurationError(
            f"{owner}(measure={describe(measure)}) was given.",
            "A measure is an instance of a subclass of lightning_ydrop.Measure.",
            "Pass, for example, measure=Conductance().",
        )


def _captum_attribution(name: str) -> Any:
    """Find a class of captum by name; captum is imported here, on first use, since that takes a while."""
    import captum.attr

    known = {
        key: value
        for key, value in vars(captum.attr).items()
        if inspect.isclass(value) and issubclass(value, captum.attr.LayerAttribution) and hasattr(value, "attribute")
    }
    # Relevance at a layer needs a rule for it, and captum has none for dropout layers, its own nn.Dropout included.
    del known["LayerLRP"]
    if name not in known:
        raise ConfigurationError(
            f"CaptumMeasure(attribution={describe(name)}) was given.",
            f"`attribution` names one of captum's layer attributions: {', '.join(sorted(known))}.",
            'Pass, for example, attribution="InternalInfluence".',
        )
    return known[name]
