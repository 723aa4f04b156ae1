"""Which layers are measured, and where their units are."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_ydrop.checks import is_list
from lightning_ydrop.errors import MOST_ITEMS, ConfigurationError, describe, listed
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.conversion import ConversionReport
from lightning_ydrop.layers.kinds import CONVERTED, dropout_like_modules
from lightning_ydrop.layers.surroundings import has_features_last
from lightning_ydrop.models.calls import dim_of_rows
from lightning_ydrop.models.modules import named_modules

LayerChoice = str | type[nn.Module]


def select_layers(
    owner: str, model: nn.Module, layers: LayerChoice | Sequence[LayerChoice] | None
) -> dict[str, nn.Module]:
    """Find modules by name or type, or every `ConductanceDropout`.

    Returns:
        The modules by name, in the order of `model.named_modules()`, each once. What compilation adds to names is
        taken out.

    Raises:
        ConfigurationError: If a name or type is not in the model. The message names `owner`, what the user called.

    """
    modules = named_modules(model)
    if layers is None:
        driven = {name: module for name, module in modules.items() if isinstance(module, ConductanceDropout)}
        if not driven:
            raise ConfigurationError(
                f"{owner} was called without `layers`, and {type(model).__name__} holds no ConductanceDropout.",
                "Those are the layers that are measured by default.",
                "Pass the names or types of others, such as layers=nn.Linear.",
            )
        return dict(driven)
    choices: list[Any] = list(layers) if is_list(layers) else [layers]  # type: ignore[arg-type]
    chosen_names: set[str] = set()
    for choice in choices or [layers]:
        if isinstance(choice, str):
            matches = {choice} & modules.keys()
        elif isinstance(choice, type):
            matches = {name for name, module in modules.items() if isinstance(module, choice)}
        else:
            matches = set()
        if not matches:
            raise ConfigurationError(
                f"{owner}(layers={_shown(choice)}) was given.",
                f"Layers are names or types of modules of {type(model).__name__}: {', '.join(filter(None, modules))}.",
                next(
                    (f"Pass its name: layers={name!r}." for name, module in modules.items() if module is choice),
                    "Pass one of these names, or the type of one.",
                ),
            )
        chosen_names |= matches
    return {name: module for name, module in modules.items() if name in chosen_names}


def _shown(choice: object) -> str:
    if isinstance(choice, type):
        return choice.__name__
    return f"an instance of {type(choice).__name__}" if isinstance(choice, nn.Module) else describe(choice)


def check_called(owner: str, chosen: Iterable[str], called: Container[str]) -> None:
    """Refuse layers that the model's forward does not call.

    Raises:
        ConfigurationError: If it leaves out any.

    """
    if missed := [name for name in chosen if name not in called]:
        raise ConfigurationError(
            f"{owner}(layers=...) chose {', '.join(map(repr, missed))}.",
            "A layer's units are what it puts out when the model's forward calls it.",
            "Leave these layers out, or call them in forward.",
        )


def unit_dims_of(layers: Mapping[str, nn.Module], unit_dim: int | None) -> dict[str, int]:
    """Say which dimension of each layer's output holds its units, as `layer_conductance` does.

    Args:
        layers: The layers by name.
        unit_dim: Of all that have none of their own; by default it goes by their kind.

    """
    return {name: _unit_dim(layer, unit_dim) for name, layer in layers.items()}


def _unit_dim(layer: nn.Module, given: int | None) -> int:
    if isinstance(layer, ConductanceDropout):
        return layer.unit_dim
    if given is not None:
        return given
    return -1 if has_features_last(layer) else 1


class Layout(NamedTuple):
    """Where an output of a layer has its rows and its units."""

    rows: int
    units: int

    def rows_first(self, output: Tensor) -> Tensor:
        """Move the rows of a tensor of this layout to the front."""
        return output.movedim(self.rows, 0) if self.rows else output

    @property
    def units_behind_rows(self) -> int:
        """The dimension of the units, once the rows are in front."""
        return self.units + 1 if 0 <= self.units < self.rows else self.units


def layout_of(output: Tensor, unit_dim: int, *, rows: int, batch_dim: int) -> Layout | None:
    """Find out where an output of a layer has its rows and its units: None where it has no such dimensions.

    Args:
        output: What it put out.
        unit_dim: The dimension of its units.
        rows: How many rows went into the model.
        batch_dim: The dimension of the rows; the first one also serves.

    """
    dim = dim_of_rows(output, rows, batch_dim)
    if dim is None or output.ndim < 2 or not -output.ndim <= unit_dim < output.ndim or unit_dim % output.ndim == dim:
        return None
    return Layout(dim, unit_dim % output.ndim if dim else unit_dim)


def count_units(
    name: str,
    layer: nn.Module,
    outputs: Sequence[Tensor],
    unit_dim: int,
    *,
    rows: int,
    batch_dim: int = 0,
    is_movable: bool = True,
) -> int:
    """Count the units of a layer, after checking that its outputs have a dimension of units beside one of all rows.

    Args:
        name: The layer's name.
        layer: The layer.
        outputs: What it put out, one for each time that it was called.
        unit_dim: The dimension of its units.
        rows: How many rows went into the model.
        batch_dim: The dimension of the rows.
        is_movable: Whether the user can say another `batch_dim`.

    Returns:
        U.

    Raises:
        ConfigurationError: If an output has no such dimensions, or the outputs have different numbers of units.

    """
    for output in outputs:
        if layout_of(output, unit_dim, rows=rows, batch_dim=batch_dim) is None:
            raise ConfigurationError(
                f"The layer {name!r} ({type(layer).__name__}, unit_dim={unit_dim}) put out {describe(output)} "
                f"for {rows} rows.",
                *_where_units_are(layer, output, rows=rows, batch_dim=batch_dim, is_movable=is_movable),
            )
    widths = list(dict.fromkeys(output.shape[unit_dim] for output in outputs))
    if len(widths) > 1:
        raise ConfigurationError(
            f"The layer {name!r} ({type(layer).__name__}, unit_dim={unit_dim}) was called several times, and put out "
            f"{' and '.join(map(str, widths))} units.",
            "The units of a layer are the same in all its calls.",
            "Make a layer for each place where it is called, or leave this one nn.Dropout"
            + (
                f": convert with exclude={name!r}." if isinstance(layer, ConductanceDropout) and layer.replaced else "."
            ),
        )
    return widths[0]


def _where_units_are(
    layer: nn.Module, output: Tensor, *, rows: int, batch_dim: int, is_movable: bool
) -> tuple[str, str]:
    """Say where rows and units of an output are to be, and what to write to have them there."""
    leave = (
        f"leave this layer out{': as nn.Dropout it stays what it is' if isinstance(layer, ConductanceDropout) else ''}."
    )
    dim = dim_of_rows(output, rows, batch_dim)
    place = (
        "first dimension" if batch_dim == 0 or dim == 0 else f"dimension {batch_dim}, as batch_dim={batch_dim} says,"
    )
    if dim is None and batch_dim:
        place = f"{place} or its first one"
    allowed = f"Its {place} holds the rows of the batch, and `unit_dim` is another of its dimensions."
    if dim is None:
        others = [other for other, size in enumerate(output.shape) if size == rows and is_movable]
        say = f", or say which dimension it is with batch_dim={others[0]}" if others else ""
        return allowed, f"Keep the batch there{say}; or {leave}"
    ways = [
        f"unit_dim={unit_dim} if they are {where}"
        for unit_dim, where in ((-1, "its last dimension"), (1, "its dimension 1"))
        if layout_of(output, unit_dim, rows=rows, batch_dim=batch_dim) is not None
        and (unit_dim == -1 or output.ndim > 2)  # where it is the last one
    ]
    if not ways:
        return allowed, f"Let it put out features beside the rows, or {leave}"
    return allowed, f"Choose the `unit_dim` of the features or channels: {', '.join(ways)}; or {leave}"


def driven_layers(model: nn.Module, report: ConversionReport | None = None) -> dict[str, ConductanceDropout]:
    """Find the layers that Y-Drop drives, by name.

    Args:
        model: The model.
        report: What a conversion has done, where one was asked for.

    Raises:
        ConfigurationError: If there are none.

    """
    layers = {name: layer for name, layer in named_modules(model).items() if isinstance(layer, ConductanceDropout)}
    if not layers:
        holds_none = (
            f"{type(model).__name__} holds no ConductanceDropout; dropout-like modules in it: "
            f"{', '.join(dropout_like_modules(model)) or 'none'}."
        )
        if report is not None:
            left = "".join(f" {name} was left: {reason}." for name, reason in list(report.left.items())[:MOST_ITEMS])
            linears = [name for name, module in named_modules(model).items() if name and isinstance(module, nn.Linear)]
            last = f"model.{linears[-1] if linears else 'head'}"
            raise ConfigurationError(
                f"{holds_none} With convert=True nothing was converted.{left}",
                "It converts modules nn.Dropout, 1d, 2d and 3d. It can't see F.dropout in a forward, as in some "
                "networks of timm.",
                f"Place a layer yourself instead, for example {last} = nn.Sequential(ConductanceDropout(p), {last}).",
            )
        convertible = [name for name, module in named_modules(model).items() if type(module) in CONVERTED]
        raise ConfigurationError(
            holds_none,
            "Y-Drop drives ConductanceDropout layers.",
            f"To convert {listed(convertible)}, pass convert=True to YDropCallback or call convert_dropout(model). "
            "Or place ConductanceDropout(p) yourself, where nn.Dropout(p) stands."
            if convertible
            else "Put ConductanceDropout(p) where F.dropout stood, or add one after each hidden layer.",
        )
    return layers


def check_widths(scores: Mapping[str, Tensor], num_units: Mapping[str, int]) -> None:
    """Refuse layers that have another number of units than in an earlier batch.

    Raises:
        ConfigurationError: If one has.

    """
    for name, values in scores.items():
        before, now = num_units.get(name, values.shape[1]), values.shape[1]
        if now != before:
            raise ConfigurationError(
                f"The layer {name!r} had {before} units in an earlier batch, and has {now} in this one.",
                "Units are features or channels, and their number is the same in all batches. Positions are no units.",
                "Choose the layer's `unit_dim`, or leave it out: as nn.Dropout it stays what it is.",
            )
