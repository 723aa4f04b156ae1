"""What makes a unit important: strategies that a YAML file can name."""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.checks import check_count, check_kind
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.attribution import sum_to_units
from lightning_ydrop.importance.conductance import conductance
from lightning_ydrop.importance.recording import Tape, recording
from lightning_ydrop.importance.request import Request
from lightning_ydrop.importance.selection import Layout, layout_of


class Measure(ABC):
    """The importance of units. Subclass it, and name the subclass in Python or YAML.

    Example:
        >>> class Depth(Measure):
        ...     def score(self, request):
        ...         return {name: torch.arange(8.0).expand(1, 8) for name in request.layers}

    """

    @abstractmethod
    def score(self, request: Request) -> dict[str, Tensor]:
        """Score the units of every layer.

        The model is as the user left it, and has to stay so: `request.borrowed` and `recording` help with that. Don't
        read values from the device, which would make the host wait.

        Returns:
            For each layer by name a tensor (N, U) of any real numbers, higher for units to be dropped more often; the
            engine averages over N (Eq. 4, arXiv 2409.09088). A layer that is left out keeps its state.

        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Conductance(Measure):
    """The paper's measure: how much of the change of the output flows through each unit (Eq. 2, arXiv 2409.09088)."""

    def score(self, request: Request) -> dict[str, Tensor]:
        """Measure all layers in one forward and one backward pass."""
        return conductance(request)


class RandomImportance(Measure):
    """A control: every unit's score is a new standard normal number each time, so only the rates are Y-Drop's."""

    def score(self, request: Request) -> dict[str, Tensor]:
        """Draw scores, after one forward pass to see how many units there are."""
        scores = {}
        for name, calls in _called(request).items():
            num_units = calls[0].shape[request.unit_dims[name]]
            drawn = torch.randn(1, num_units, dtype=torch.float32, generator=request.generator, device="cpu")
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

    def score(self, request: Request) -> dict[str, Tensor]:
        """Negate the scores of the wrapped measure."""
        return {name: -scores for name, scores in self.measure.score(request).items()}

    def __repr__(self) -> str:
        return f"Inverted({self.measure!r})"


class Shuffled(Measure):
    """A control: each unit of a layer gets the score of another unit, of the same one in every phase 1.

    Its ranking is as steady as that of the measure, unlike RandomImportance's. Only the units are wrong.

    Args:
        measure: The measure whose scores the units exchange.
        seed: Seed of who gets whose score.

    Raises:
        ConfigurationError: If it is no measure, or the seed is no whole number.

    """

    def __init__(self, measure: Measure, seed: int = 0) -> None:
        check_measure("Shuffled", measure)
        check_count("Shuffled", "seed", seed, minimum=0, example=0)
        self.measure = measure
        self.seed = seed

    def score(self, request: Request) -> dict[str, Tensor]:
        """Exchange the scores of the wrapped measure."""
        scores = {}
        for name, values in self.measure.score(request).items():
            order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(self.seed), device="cpu")
            # Each gets the score of the next one in a circle of all units, so none keeps its own.
            giver = torch.empty_like(order).scatter(0, order, order.roll(1))
            scores[name] = values[:, giver.to(values.device, non_blocking=True)]
        return scores

    def __repr__(self) -> str:
        return f"Shuffled({self.measure!r}, seed={self.seed})"


class CaptumMeasure(Measure):
    """Any of captum's layer attributions, by name: one or more passes for each layer, so slower than `Conductance`.

    Each attributes F to the layer's output, with what it takes of phase 1's settings: the baseline, and the number of
    steps on an equally spaced path. Captum rounds its path to float32. All of captum's layer attributions are here
    except LayerLRP, which cannot be taken at a dropout layer.

    Args:
        attribution: Name of a class of `captum.attr`, such as "InternalInfluence", "LayerConductance",
            "LayerGradientXActivation" or "LayerDeepLift".
        arguments: More keyword arguments for its `attribute` method, or other values for those set here.

    Raises:
        ConfigurationError: If captum has no such layer attribution, or that one no such arguments.

    """

    def __init__(self, attribution: str = "InternalInfluence", arguments: dict[str, Any] | None = None) -> None:
        takes = inspect.signature(_captum_attribution(attribution).attribute).parameters
        if arguments is not None and not (isinstance(arguments, dict) and arguments.keys() <= takes.keys()):
            raise ConfigurationError(
                f"CaptumMeasure({attribution!r}, arguments={describe(arguments)}) was given.",
                f"`arguments` names some of captum's: {', '.join(name for name in takes if name != 'self')}.",
                'Pass, for example, arguments={"n_steps": 50}.',
            )
        self.attribution = attribution
        self.arguments = dict(arguments or {})

    def score(self, request: Request) -> dict[str, Tensor]:
        """Attribute each layer in turn."""
        attribution = _captum_attribution(self.attribution)
        objective = _RowObjective(request)
        takes = inspect.signature(attribution.attribute).parameters
        offered = {
            "baselines": tuple(
                start.expand_as(item) for start, item in zip(request.starts, request.inputs, strict=True)
            ),
            "additional_forward_args": objective.besides,
            "n_steps": request.n_steps,
            "method": "riemann_trapezoid",
            "attr_dim_summation": False,
        }
        arguments = {name: value for name, value in offered.items() if name in takes} | self.arguments
        called = _called(request)
        scores = {}
        with request.borrowed():
            for name in called:
                layer, unit_dim = request.layers[name], request.unit_dims[name]
                attributed = attribution(objective, layer).attribute(request.inputs, **arguments).detach()
                rows = request.num_samples
                layout = layout_of(attributed, unit_dim, rows=rows, batch_dim=request.dim_of_rows(name))
                layout = layout or Layout(0, unit_dim)
                scores[name] = sum_to_units(layout.rows_first(attributed), layout.units_behind_rows)
        return scores

    def __repr__(self) -> str:
        return f"CaptumMeasure({self.attribution!r}{f', {self.arguments!r}' if self.arguments else ''})"


def scores_by(measure: Measure, request: Request) -> dict[str, Tensor]:
    """Let a measure score. What it raises itself gets a note that says what it was called with."""
    try:
        return measure.score(request)
    except ConfigurationError:
        raise
    except Exception as error:
        if not getattr(error, "__notes__", None):  # of what the model or the objective has raised
            error.add_note(
                f"lightning_ydrop called {measure!r}.score with a request of {request.num_samples} samples, "
                f"{describe(request.inputs)}, and {request.n_steps} steps. "
                "It returns a tensor (N, U) for each layer by name. Mend it, or choose another measure=...."
            )
        raise


def _called(request: Request) -> Tape:
    """See which layers the forward pass calls, and what they put out for the samples."""
    with request.borrowed(constant_parameters=True), recording(request.layers) as tape:
        request.output(request.inputs, request.carried)
    return tape


class _RowObjective(nn.Module):
    """A module that returns F for each row, as captum wants it. What is carried along comes after the inputs."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.model = request.model
        self.request = request
        # Captum repeats these with the inputs.
        self.besides = (*request.carried, *(() if request.target is None else (request.target,)))

    def forward(self, *rows: Tensor) -> Tensor:
        num_inputs = len(self.request.inputs)
        inputs, besides = rows[:num_inputs], rows[num_inputs:]
        if self.request.target is None:
            return self.request.value(inputs, besides, None)
        return self.request.value(inputs, besides[:-1], besides[-1])


def check_measure(owner: str, measure: object) -> None:
    """Refuse what is no measure.

    Raises:
        ConfigurationError: If it is not.

    """
    check_kind(owner, "measure", measure, Measure, example="Conductance()")


def is_conductance(measure: Measure) -> bool:
    """Tell whether a measure ranks by conductance, as it is or rearranged."""
    while isinstance(measure, (Inverted, Shuffled)):
        measure = measure.measure
    return isinstance(measure, Conductance)


def _captum_attribution(name: str) -> Any:
    """Find a class of captum by name; captum is imported here, on first use, since that takes a while."""
    import captum.attr

    attributions = {
        key: value
        for key, value in vars(captum.attr).items()
        if inspect.isclass(value) and issubclass(value, captum.attr.LayerAttribution) and hasattr(value, "attribute")
    }
    # Relevance at a layer needs a rule for it, and captum has none for dropout layers, its own nn.Dropout included.
    attributions.pop("LayerLRP", None)
    if not isinstance(name, str) or name not in attributions:
        raise ConfigurationError(
            f"CaptumMeasure(attribution={describe(name)}) was given.",
            f"`attribution` names one of captum's layer attributions: {', '.join(sorted(attributions))}.",
            'Pass, for example, attribution="InternalInfluence".',
        )
    return attributions[name]
