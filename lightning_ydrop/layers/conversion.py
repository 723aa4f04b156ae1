"""From nn.Dropout to ConductanceDropout or Jumpout in a built model, and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_ydrop.checks import check_module
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.rates import Buckets
from lightning_ydrop.layers.conductance_dropout import ConductanceDropout
from lightning_ydrop.layers.jumpout import Jumpout
from lightning_ydrop.layers.kinds import CONVERTED, drops, is_dropout_like
from lightning_ydrop.layers.names import NamePatterns, check_patterns, fits_any, reported
from lightning_ydrop.layers.surroundings import Place, Surroundings, drops_attention_weights

Twin = ConductanceDropout | Jumpout
Patterns = str | Sequence[str] | None

COMPILED_ALONE = "compiled by itself, it would be called even when another stood there"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_dropout` or `restore_dropout` did with the dropout layers of a model.

    Attributes:
        converted: By name: what a layer was, what it is now, and why its units are where they are.
        left: By name: why a layer that drops was left as it was.
        rates: By the rate p of the converted layers: about which rates Y-Drop drops their units at, the less and the
            more important half. `YDropCallback(buckets=...)` overrides them.

    """

    converted: dict[str, str]
    left: dict[str, str]
    rates: dict[float, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        why = "" if self.converted or self.left else ": the model holds none to change"
        lines = [f"{len(self.converted)} dropout layer(s) converted, {len(self.left)} left{why}."]
        lines += [f"  {name}: {change}" for name, change in self.converted.items()]
        lines += [f"  {name or 'the model itself'}: left, {reason}" for name, reason in self.left.items()]
        lines += [
            f"Y-Drop turns p={p:g} into about {low:.2f} and {high:.2f} by importance."
            if p > 0
            else "Layers of p=0 drop nothing with Y-Drop either, unless it is given buckets=Buckets()."
            for p, (low, high) in self.rates.items()
        ]
        lines.append(
            "Calls of F.dropout in a forward are no modules: they stay. YDropCallback names them in the first batch."
        )
        return "\n".join(lines)


def convert_dropout(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    unit_dim: Mapping[str, int] | None = None,
    to: type[Twin] = ConductanceDropout,
) -> ConversionReport:
    """Replace every nn.Dropout, nn.Dropout1d, 2d and 3d of a model with a ConductanceDropout or a Jumpout.

    A ConductanceDropout that is not driven drops exactly as the old layer did, with the same random numbers, but never
    in place. An instance at several places becomes one new layer at all of them. A pattern that fits one of its names
    applies to all of them. A second call converts the layers that were added since. `restore_dropout` undoes it. If an
    error is raised, the model is as it was.

    The units of nn.Dropout1d, 2d and 3d are the channels. The layers around an nn.Dropout decide where its units are:
    in dimension 1 for convolutions, their norms and pooling, in the last dimension for linear layers, layer norms,
    embeddings (including patch embeddings), attention and recurrent layers. The closest such layer before it in its
    container decides. Without one, the closest after it decides, then the layers around the container. The report says
    which layer decided.

    A dropout of attention weights is left as it is, because the last dimension of the weights is positions, not units.
    Names tell: `attn_drop` and similar, or `dropout` in a module whose class is called attention and which makes
    queries.

    A Jumpout draws its own rates, whatever the rate of the old layer was. It replaces only a layer after a ReLU, in the
    order of definition, with nothing in between but pooling, flattening and other dropout. It has the default
    arguments. Its attributes can be set afterwards.

    Args:
        model: The model. It is changed.
        include: Patterns of the names of modules to convert, as in fnmatch, such as "classifier.*". Each fits at least
            one module that drops. None converts all.
        exclude: Patterns of the names of modules to leave.
        unit_dim: From patterns of names to the `unit_dim` of nn.Dropout layers, where the report shows a wrong one, or
            where a layer was left because of its name. The first pattern that fits counts.
        to: `ConductanceDropout` or `Jumpout`. A Jumpout has no `unit_dim`.

    Returns:
        What was converted, what was left, and why.

    Raises:
        ConfigurationError: If the model itself is a dropout, a pattern fits no module, a pattern of `include` fits none
            that drops, or a `unit_dim` is out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        >>> print(convert_dropout(model))
        1 dropout layer(s) converted, 0 left.
          2: Dropout(p=0.2) -> ConductanceDropout(p=0.2, unit_dim=-1, elementwise=True), behind Linear
        Y-Drop turns p=0.2 into about 0.06 and 0.26 by importance.
        Calls of F.dropout in a forward are no modules: they stay. YDropCallback names them in the first batch.

    """
    check_module("convert_dropout", model)
    check_patterns("convert_dropout", "include", include)
    check_patterns("convert_dropout", "exclude", exclude)
    if unit_dim is not None and not isinstance(unit_dim, Mapping):
        raise ConfigurationError(
            f"convert_dropout(unit_dim={describe(unit_dim)}) was given.",
            "`unit_dim` is a mapping from patterns of names to dimensions.",
            'Pass, for example, unit_dim={"encoder.*": -1}.',
        )
    if to not in (ConductanceDropout, Jumpout) or (to is Jumpout and unit_dim is not None):
        raise ConfigurationError(
            f"convert_dropout(to={describe(to)}, unit_dim={describe(unit_dim)}) was given.",
            "`to` is the class ConductanceDropout or Jumpout, and Jumpout takes no `unit_dim`.",
            "Pass, for example, to=Jumpout alone.",
        )
    if type(model) in CONVERTED:
        raise _not_by_itself("convert_dropout", model)
    surroundings = Surroundings(model)
    _check_that_patterns_fit(model, surroundings.places, include, exclude, unit_dim or {})
    conversion = _Conversion(surroundings, include, exclude, unit_dim or {}, to)
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    replacements: list[tuple[Place, nn.Module]] = []
    for layer in _layers(surroundings.places):
        if reason := conversion.reason_to_leave(layer):
            left |= dict.fromkeys(layer.names, reason)
        elif type(layer.module) in CONVERTED:
            twin, why = conversion.twin_of(layer)
            converted |= _changes(layer, twin, why)
            replacements += [(place, twin) for place in layer.places]
    # All twins are made by now: whatever can be refused has been.
    _replace(replacements)
    order = [reported(place.name) for place in surroundings.places]
    driven = sorted({float(twin.p) for _, twin in replacements if isinstance(twin, ConductanceDropout)})
    buckets = {p: Buckets.around(p) for p in driven}
    rates = {p: (each.low.expected, each.high.expected) for p, each in buckets.items()}
    return ConversionReport(_in_order(converted, order), _in_order(left, order), rates)


def restore_dropout(model: nn.Module) -> ConversionReport:
    """Undo `convert_dropout`: put the original modules back, in the mode of the layers that they replace.

    If an error is raised, the model is as it was.

    Args:
        model: The model. It is changed.

    Returns:
        What was restored, and which of our layers was left because `convert_dropout` did not make it.

    Raises:
        ConfigurationError: If the model itself is a layer that `convert_dropout` made.

    Example:
        >>> drop = nn.Dropout(0.2)
        >>> model = nn.Sequential(nn.Linear(4, 8), drop)
        >>> report = convert_dropout(model)
        >>> print(restore_dropout(model).converted)
        {'1': 'ConductanceDropout(p=0.2, unit_dim=-1, elementwise=True) -> Dropout(p=0.2, inplace=False)'}
        >>> model[1] is drop
        True

    """
    check_module("restore_dropout", model)
    if isinstance(model, Twin) and model.replaced:
        raise _not_by_itself("restore_dropout", model)
    places = Surroundings(model).places
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    replacements: list[tuple[Place, nn.Module]] = []
    for layer in _layers(places):
        if not isinstance(layer.module, Twin):
            continue
        if not layer.module.replaced:
            left |= dict.fromkeys(layer.names, "it was not made by convert_dropout")
        elif layer.is_compiled_alone:
            left |= dict.fromkeys(layer.names, COMPILED_ALONE)
        else:
            (original,) = layer.module.replaced
            converted |= dict.fromkeys(layer.names, f"{layer.module!r} -> {original!r}")
            replacements += [(place, original) for place in layer.places]
    _replace(replacements)
    for place, original in replacements:
        original.training = place.module.training
    order = [reported(place.name) for place in places]
    return ConversionReport(_in_order(converted, order), _in_order(left, order))


@dataclass(frozen=True)
class _Layer:
    """A module and all its places in a model."""

    module: nn.Module
    places: list[Place]

    @property
    def names(self) -> list[str]:
        return [reported(place.name) for place in self.places]

    @property
    def is_compiled_alone(self) -> bool:
        return any(place.called == "_orig_mod" for place in self.places)


class _Conversion:
    """What a call of `convert_dropout` decides for each layer."""

    def __init__(
        self,
        surroundings: Surroundings,
        include: Patterns,
        exclude: Patterns,
        unit_dim: Mapping[str, int],
        to: type[Twin],
    ) -> None:
        self._surroundings = surroundings
        self._include = None if include is None else NamePatterns(_as_list(include))
        self._exclude = NamePatterns(_as_list(exclude))
        self._placed = NamePatterns(list(unit_dim))
        self._dims = list(unit_dim.values())
        self._to = to

    def reason_to_leave(self, layer: _Layer) -> str | None:
        """Say why a layer that drops is not converted. None for a layer that is converted or does not drop."""
        module = layer.module
        if type(module) not in CONVERTED:
            return self._reason_of_another_kind(module)
        if self._include is not None and not self._include.fit(layer.names):
            return "not included"
        if self._exclude.fit(layer.names):
            return "excluded"
        if any(getattr(module, hooks) for hooks in HOOKS):
            return "it has hooks, which a new layer would not have"
        if layer.is_compiled_alone:
            return COMPILED_ALONE
        if module.p == 1:
            return "with p=1 it drops everything, and nothing is left to rescale"
        if self._is_of_attention(layer):
            return "it drops attention weights, by its name; pass its unit_dim if these are features"
        if self._to is Jumpout and module.p == 0:
            return "with p=0 it drops nothing, and Jumpout would"
        if self._to is Jumpout and not all(map(self._surroundings.follows_relu, layer.places)):
            return "no nn.ReLU is seen before it"
        return None

    def twin_of(self, layer: _Layer) -> tuple[Twin, str]:
        """Make the layer that replaces a dropout of torch, and say why it has these arguments."""
        module = layer.module
        twin: Twin
        elementwise = type(module) is nn.Dropout
        if self._to is Jumpout:
            twin, why = Jumpout(granularity="element" if elementwise else "channel"), "behind ReLU"
        else:
            told = self._told_dim(layer)
            dim, why = self._surroundings.unit_dim_of(layer.places[0]) if told is None else (told, "as told")
            twin = ConductanceDropout(module.p, dim, elementwise)  # type: ignore[arg-type]
        twin.replaced = (module,)
        twin.training = module.training
        return twin, why

    def _told_dim(self, layer: _Layer) -> int | None:
        """Find the `unit_dim` that the caller passed for an nn.Dropout. The others have their channels as units."""
        index = self._placed.first(layer.names) if type(layer.module) is nn.Dropout else None
        return None if index is None else self._dims[index]

    def _is_of_attention(self, layer: _Layer) -> bool:
        return (
            type(layer.module) is nn.Dropout
            and self._told_dim(layer) is None
            and any(drops_attention_weights(place.holder, place.called) for place in layer.places)
        )

    def _reason_of_another_kind(self, module: nn.Module) -> str | None:
        if isinstance(module, nn.MultiheadAttention) and drops(module):
            return f"dropout={module.dropout:g} of its attention weights is no module, and they have no units"
        if isinstance(module, nn.RNNBase) and drops(module):
            return (
                f"dropout={module.dropout:g} between its recurrent layers is no module; write several recurrent layers "
                "with nn.Dropout between them"
            )
        if self._to is Jumpout and isinstance(module, ConductanceDropout):
            return (
                "it is a ConductanceDropout; restore_dropout, where that has been convert_dropout's work, comes first"
            )
        if is_dropout_like(module) and not isinstance(module, Twin):
            return f"{type(module).__name__} is none of nn.Dropout, 1d, 2d and 3d"
        return None


def _check_that_patterns_fit(
    model: nn.Module, places: Sequence[Place], include: Patterns, exclude: Patterns, unit_dim: Mapping[str, int]
) -> None:
    """Refuse a pattern that fits the name of no module, or in `include` of none that drops.

    Raises:
        ConfigurationError: If there is one.

    """
    names = {reported(place.name): place.module for place in places}
    dropping = {name: module for name, module in names.items() if is_dropout_like(module)}
    included = _as_list(include)
    of_module = "A pattern fits the name of a module"
    known = next(iter(dropping), "classifier.*")
    for patterns, allowed, rule, example in (
        (included, names, of_module, f'include="{known}"'),
        (_as_list(exclude), names, of_module, f'exclude="{known}"'),
        (unit_dim, names, of_module, f'unit_dim={{"{known}": -1}}'),
        (included, dropping, "A pattern to include fits the name of a module that drops", f'include="{known}"'),
    ):
        for pattern in patterns:
            if isinstance(pattern, str) and fits_any(pattern, allowed):
                continue
            there = ", ".join(f"{name} ({type(module).__name__})" for name, module in dropping.items())
            raise ConfigurationError(
                f"The pattern {describe(pattern)} was given to convert {type(model).__name__}.",
                f"{rule}; those that drop are {there or 'none'}.",
                f"Pass, for example, {example}.",
            )


def _changes(layer: _Layer, twin: Twin, why: str) -> dict[str, str]:
    """Describe a conversion, by each name of the layer."""
    change = f"{type(layer.module).__name__}(p={layer.module.p}) -> {twin!r}, "
    added = ", no longer in place" if layer.module.inplace else ""
    first, *others = layer.names
    again = dict.fromkeys(others, f"{change}as before, where it is the same layer{added}")
    return {first: f"{change}{why}{added}"} | again


def _replace(replacements: Iterable[tuple[Place, nn.Module]]) -> None:
    """Put modules at places. If one cannot be put there, put back what was replaced before."""
    done: list[Place] = []
    try:
        for place, module in replacements:
            done.append(place)
            place.holder.register_module(place.called, module)
    except BaseException:
        for place in done:
            # Not by a method, which may be what has raised.
            place.holder._modules[place.called] = place.module
        raise


def _layers(places: Iterable[Place]) -> list[_Layer]:
    """Group the places of each module."""
    layers: dict[int, _Layer] = {}
    for place in places:
        layers.setdefault(id(place.module), _Layer(place.module, [])).places.append(place)
    return list(layers.values())


def _in_order(texts: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    return {name: texts[name] for name in names if name in texts}


def _not_by_itself(owner: str, layer: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"{owner}({layer}) was given.",
        "A layer is replaced in the module that holds it.",
        "Pass that module.",
    )


def _as_list(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or [])
