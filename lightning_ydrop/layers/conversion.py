"""From nn.Dropout to ConductanceDropout or Jumpout, in a model that is built, and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_ydrop.checks import check_module
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers.conductance_dropout import ConductanceDropout
from lightning_ydrop.layers.jumpout import Jumpout
from lightning_ydrop.layers.kinds import is_dropout_like
from lightning_ydrop.layers.surroundings import CONVERTED, drops_attention_weights, follows_relu, unit_dim_of

Twin = ConductanceDropout | Jumpout
Patterns = str | Sequence[str] | None

COMPILED_ALONE = "compiled by itself, it would be called even when another stood there"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class ConversionReport:
    """What became of a model's dropout layers.

    Attributes:
        converted: By name, what a layer was, what it has become, and why its units are where they are.
        left: By name, why something that drops was left as it was.

    """

    converted: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        why = "" if self.converted or self.left else ": the model holds none to change"
        lines = [f"{len(self.converted)} dropout layer(s) converted, {len(self.left)} left{why}."]
        lines += [f"  {name}: {change}" for name, change in self.converted.items()]
        lines += [f"  {name or 'the model itself'}: left, {reason}" for name, reason in self.left.items()]
        lines.append("Calls of torch.nn.functional.dropout in a forward are no modules: they are not seen, and stay.")
        return "\n".join(lines)


def convert_dropout(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    unit_dim: Mapping[str, int] | None = None,
    to: type[Twin] = ConductanceDropout,
) -> ConversionReport:
    """Put a ConductanceDropout, or a Jumpout, where every nn.Dropout, 1d, 2d and 3d of a model stands.

    Undriven, a ConductanceDropout drops as the old layer did, bit for bit, but never in place. One instance at several
    places becomes one new layer there, and a pattern that fits one of its names fits it at all of them. A second call
    converts what has been added. `restore_dropout` undoes it.

    The units of nn.Dropout1d, 2d and 3d are the channels. Those of nn.Dropout lie where the layers around it put them:
    in dimension 1 behind convolutions and what goes with them, in the last one behind linear layers, layer norms,
    embeddings, of patches too, attention and recurrent layers; the closest such layer before it in its container
    decides, otherwise the closest behind it, otherwise those around the container. The report says which it was.

    What drops attention weights, by its name, is left: the last dimension of these is positions, which are no units. So
    nn.Dropout called `attn_drop` and the like, or `dropout` in a module that is called after attention and makes
    queries.

    A Jumpout, which draws rates of its own whatever that of the old layer was, comes only where a ReLU stands before,
    in the order of definition, with nothing between the two but pooling, flattening and other dropout. Its arguments
    are its defaults; they are attributes that can be set afterwards.

    Args:
        model: The model, which is changed.
        include: Names of the modules to convert, as patterns of fnmatch such as "classifier.*", each of which fits
            something that drops. None: all.
        exclude: Names of those to leave.
        unit_dim: Patterns of names, and the `unit_dim` of nn.Dropout there, where the report shows a wrong one, or one
            that was left for its name.
        to: `ConductanceDropout` or `Jumpout`, which has no `unit_dim`.

    Returns:
        What was converted, and what was left and why.

    Raises:
        ConfigurationError: If the model itself is a dropout, a pattern fits no module or, to include, none that drops,
            or a `unit_dim` is out of range. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        >>> print(convert_dropout(model))
        1 dropout layer(s) converted, 0 left.
          2: Dropout(p=0.2) -> ConductanceDropout(p=0.2, unit_dim=-1, elementwise=True), behind Linear
        Calls of torch.nn.functional.dropout in a forward are no modules: they are not seen, and stay.

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
            "`to` is the class ConductanceDropout or Jumpout, which takes no `unit_dim`.",
            "Pass, for example, to=Jumpout alone.",
        )
    if type(model) in CONVERTED:
        raise _not_by_itself("convert_dropout", model)
    modules = _named(model)
    included, excluded, placed = _as_list(include), _as_list(exclude), dict(unit_dim or {})
    for pattern in [*(included or []), *(excluded or []), *placed]:
        _check_pattern(model, pattern, modules, "A pattern fits the name of a module")
    dropping = _dropping(modules)
    for pattern in included or []:
        _check_pattern(model, pattern, dropping, "A pattern to include fits the name of a module that drops")
    all_names = _all_names(modules)
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    twins: dict[int, Twin] = {}
    for name, module in modules.items():
        names = all_names[id(module)]
        if reason := _reason_to_leave(model, names, module, included, excluded, placed, to):
            left[_reported(name)] = reason
        elif type(module) in CONVERTED:
            why = "as before, where it is the same layer"
            if id(module) not in twins:
                twins[id(module)], why = _twin(model, names, module, placed, to)
            why += ", no longer in place" if module.inplace else ""
            # Y-Drop's rates are its own: what dropped nothing would be driven like the others.
            why += ", which drops nothing until Y-Drop drives it" if module.p == 0 else ""
            converted[_reported(name)] = f"{type(module).__name__}(p={module.p}) -> {twins[id(module)]!r}, {why}"
    # Put in place when all are made, so that a `unit_dim` that is refused leaves the model as it was.
    for name, module in modules.items():
        if id(module) in twins:
            _replace(model, name, twins[id(module)])
    return ConversionReport(converted, left)


def restore_dropout(model: nn.Module) -> ConversionReport:
    """Undo `convert_dropout`: the very modules that stood there stand there again, in the mode of those that go.

    Args:
        model: The model, which is changed.

    Returns:
        What was restored, and which of our layers was left, since it was there from the beginning.

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
    modules = _named(model)
    all_names = _all_names(modules)
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in modules.items():
        if not isinstance(module, Twin):
            continue
        if not module.replaced:
            left[_reported(name)] = "it was not made by convert_dropout"
        elif _is_compiled_alone(all_names[id(module)]):
            left[_reported(name)] = COMPILED_ALONE
        else:
            for original in module.replaced:
                original.training = module.training
                _replace(model, name, original)
                converted[_reported(name)] = f"{module!r} -> {original!r}"
    return ConversionReport(converted, left)


def check_patterns(owner: str, name: str, patterns: object) -> None:
    """Refuse what are no patterns of names.

    Raises:
        ConfigurationError: If it is neither None, nor a word, nor a list of words.

    """
    listed = [patterns] if isinstance(patterns, str) else patterns
    if patterns is not None and not (
        isinstance(listed, (list, tuple)) and all(isinstance(each, str) for each in listed)
    ):
        raise ConfigurationError(
            f"{owner}({name}={describe(patterns)}) was given.",
            f"`{name}` holds patterns of the names of modules.",
            f'Pass, for example, {name}="classifier.*".',
        )


def _not_by_itself(owner: str, layer: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"{owner}({layer}) was given.",
        "A layer is replaced in the module that holds it.",
        "Pass that module.",
    )


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by every name that it has."""
    return dict(model.named_modules(remove_duplicate=False))


def _all_names(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """All names of each instance, by its id."""
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
    return names


def drops(module: nn.Module) -> bool:
    """Tell whether a module drops something, by what it is or is called."""
    return isinstance(module, ConductanceDropout) or is_dropout_like(module)


def _dropping(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that drop."""
    return {name: module for name, module in modules.items() if drops(module)}


def _reported(name: str) -> str:
    """Take out of a name what compilation adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _is_compiled_alone(names: Sequence[str]) -> bool:
    return any(name.rpartition(".")[2] == "_orig_mod" for name in names)


def _as_list(patterns: Patterns) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _fits(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(_reported(name), pattern) for name in names)


def _check_pattern(model: nn.Module, pattern: object, names: Iterable[str], rule: str) -> None:
    """Refuse a pattern that fits none of the names, as `rule` says that it should."""
    if not isinstance(pattern, str) or not _fits(names, pattern):
        there = ", ".join(
            f"{_reported(name)} ({type(module).__name__})" for name, module in _dropping(_named(model)).items()
        )
        raise ConfigurationError(
            f"The pattern {describe(pattern)} was given to convert {type(model).__name__}.",
            f"{rule}; those that drop are {there or 'none'}.",
            'Pass, for example, include="classifier.*".',
        )


def _reason_to_leave(
    model: nn.Module,
    names: Sequence[str],
    module: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    placed: Mapping[str, int],
    to: type[Twin],
) -> str | None:
    """Say why something that drops is not converted: None for what is, and for what does not drop."""
    if type(module) not in CONVERTED:
        return _reason_of_another_kind(module, to)
    if include is not None and not any(_fits(names, pattern) for pattern in include):
        return "not included"
    if exclude is not None and any(_fits(names, pattern) for pattern in exclude):
        return "excluded"
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks, which a new layer would not have"
    if _is_compiled_alone(names):
        return COMPILED_ALONE
    if module.p == 1:
        return "with p=1 it drops everything, and nothing is left to rescale"
    told = _told_dim(names, module, placed) is not None
    if not told and type(module) is nn.Dropout and any(drops_attention_weights(*_place(model, name)) for name in names):
        return "it drops attention weights, by its name; pass its unit_dim if these are features"
    if to is Jumpout and module.p == 0:
        return "with p=0 it drops nothing, and Jumpout would"
    if to is Jumpout and not all(follows_relu(model, name) for name in names):
        return "no nn.ReLU is seen before it"
    return None


def _told_dim(names: Sequence[str], module: nn.Module, placed: Mapping[str, int]) -> int | None:
    """Find the `unit_dim` that the caller gives to an nn.Dropout, if any: units of the others are their channels."""
    told = (dim for pattern, dim in placed.items() if _fits(names, pattern))
    return next(told, None) if type(module) is nn.Dropout else None


def _reason_of_another_kind(module: nn.Module, to: type[Twin]) -> str | None:
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return "dropout of attention weights is no module"
    if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
        return "dropout between its recurrent layers is no module"
    if to is Jumpout and isinstance(module, ConductanceDropout):
        return "it is a ConductanceDropout; restore_dropout, where that has been convert_dropout's work, comes first"
    if drops(module) and not isinstance(module, Twin):
        return f"{type(module).__name__} is none of nn.Dropout, 1d, 2d and 3d"
    return None


def _twin(
    model: nn.Module, names: Sequence[str], module: nn.Module, placed: Mapping[str, int], to: type[Twin]
) -> tuple[Twin, str]:
    """Make the layer that stands for a dropout of torch's, and say why it is like that."""
    twin: Twin
    elementwise = type(module) is nn.Dropout
    if to is Jumpout:
        twin, why = Jumpout(granularity="element" if elementwise else "channel"), "behind ReLU"
    else:
        told = _told_dim(names, module, placed)
        dim, why = unit_dim_of(model, names[0], module) if told is None else (told, "as told")
        twin = ConductanceDropout(module.p, dim, elementwise)  # type: ignore[arg-type]
    twin.replaced = (module,)
    twin.training = module.training
    return twin, why


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Find what holds a module, and what it is called there."""
    holder, _, called = name.rpartition(".")
    return model.get_submodule(holder), called


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    holder, called = _place(model, name)
    holder.register_module(called, module)
