"""From nn.Dropout to ConductanceDropout, in a model that is built, and back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_ydrop.errors import ConfigurationError, check_module, describe, dropout_like_modules, is_dropout_like
from lightning_ydrop.layers.conductance_dropout import ConductanceDropout

Patterns = str | Sequence[str] | None

CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
CONVERTED = (nn.Dropout, *CHANNEL_DROPOUTS)
FEATURES_LAST = (
    *(nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.Flatten),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
CHANNELS_SECOND = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
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
        lines = [f"{len(self.converted)} dropout layer(s) converted, {len(self.left)} left."]
        lines += [f"  {name}: {change}" for name, change in self.converted.items()]
        lines += [f"  {name}: left, {reason}" for name, reason in self.left.items()]
        lines.append("Calls of torch.nn.functional.dropout in a forward are no modules: they are not seen, and stay.")
        return "\n".join(lines)


def convert_dropout(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    unit_dim: Mapping[str, int] | None = None,
) -> ConversionReport:
    """Put a ConductanceDropout where every nn.Dropout, 1d, 2d and 3d of a model stands.

    Undriven, the new layers drop as the old ones did, bit for bit. What is called by the same instance at several
    places is so afterwards. A second call converts what has been added. `restore_dropout` undoes it.

    The units of nn.Dropout1d, 2d and 3d are the channels. Those of nn.Dropout lie where the layers around it put them:
    in dimension 1 behind convolutions and what goes with them, in the last one behind linear layers, layer norms,
    embeddings, attention and recurrent layers; the closest such layer before it in its container decides, otherwise the
    closest behind it, otherwise those around the container. The report says which it was.

    Args:
        model: The model, which is changed.
        include: Names of the modules to convert, as patterns of fnmatch such as "classifier.*". None: all.
        exclude: Names of those to leave.
        unit_dim: Patterns of names, and the `unit_dim` of nn.Dropout there, where the report shows a wrong one.

    Returns:
        What was converted, and what was left and why.

    Raises:
        ConfigurationError: If the model itself is a dropout, or a pattern fits no module.

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
    if type(model) in CONVERTED:
        raise ConfigurationError(
            f"convert_dropout({model}) was given.",
            "A layer is replaced in the module that holds it.",
            "Pass that module, or put ConductanceDropout where this layer is made.",
        )
    modules = _named(model)
    included, excluded, placed = _as_list(include), _as_list(exclude), dict(unit_dim or {})
    for pattern in [*(included or []), *(excluded or []), *placed]:
        _check_pattern(model, modules, pattern)
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    made: dict[int, ConductanceDropout] = {}
    for name, module in modules.items():
        if reason := _reason_to_leave(name, module, included, excluded):
            left[_reported(name)] = reason
        if type(module) not in CONVERTED or reason:
            continue
        why = "as before, where it is the same layer"
        if id(module) not in made:
            dim, why = _unit_dim(model, name, module, placed)
            made[id(module)] = _twin(module, dim)
        _replace(model, name, made[id(module)])
        converted[_reported(name)] = f"{type(module).__name__}(p={module.p}) -> {made[id(module)]!r}, {why}"
    return ConversionReport(converted, left)


def restore_dropout(model: nn.Module) -> ConversionReport:
    """Undo `convert_dropout`: the very modules that stood there stand there again, in the mode of those that go.

    Args:
        model: The model, which is changed.

    Returns:
        What was restored, and which ConductanceDropout was left, since it was there from the beginning.

    """
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in _named(model).items():
        if isinstance(module, ConductanceDropout):
            if not module.replaced:
                left[_reported(name)] = "it was not made by convert_dropout"
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


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by every name that it has."""
    return dict(model.named_modules(remove_duplicate=False))


def _reported(name: str) -> str:
    """Take out of a name what compilation adds."""
    return name.replace("_orig_mod.", "")


def _as_list(patterns: Patterns) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(_reported(name), pattern)


def _check_pattern(model: nn.Module, modules: Mapping[str, nn.Module], pattern: object) -> None:
    if not isinstance(pattern, str) or not any(_fits(name, pattern) for name in modules):
        raise ConfigurationError(
            f"The pattern {describe(pattern)} was given to convert {type(model).__name__}.",
            f"A pattern fits the name of a module; those that drop are {', '.join(dropout_like_modules(model))}.",
            'Pass, for example, include="classifier.*".',
        )


def _reason_to_leave(
    name: str, module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> str | None:
    """Say why something that drops is not converted: None for what is, and for what does not drop."""
    if type(module) not in CONVERTED:
        return _reason_of_another_kind(module)
    if include is not None and not any(_fits(name, pattern) for pattern in include):
        return "not included"
    if exclude is not None and any(_fits(name, pattern) for pattern in exclude):
        return "excluded"
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks, which a new layer would not have"
    if module.p == 1:
        return "with p=1 it drops everything, and nothing is left to rescale"
    return None


def _reason_of_another_kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return "dropout of attention weights is no module"
    if isinstance(module, nn.RNNBase) and module.dropout > 0:
        return "dropout between its recurrent layers is no module"
    if is_dropout_like(module) and not list(module.children()) and not isinstance(module, ConductanceDropout):
        return f"{type(module).__name__} is none of nn.Dropout, 1d, 2d and 3d"
    return None


def _unit_dim(model: nn.Module, name: str, module: nn.Module, placed: Mapping[str, int]) -> tuple[int, str]:
    """Find the dimension of the units, and say why it is that one."""
    if isinstance(module, CHANNEL_DROPOUTS):
        return 1, "its channels"
    for pattern, dim in placed.items():
        if _fits(name, pattern):
            return dim, "as told"
    path = name.split(".")
    for depth in reversed(range(len(path))):
        children = dict(model.get_submodule(".".join(path[:depth])).named_children())
        names = list(children)
        position = names.index(path[depth])
        for neighbour in reversed(names[:position]):
            for behind in reversed(list(_deciding(children[neighbour]))):
                return _dim_around(behind), f"behind {type(behind).__name__}"
        for neighbour in names[position + 1 :]:
            for before in _deciding(children[neighbour]):
                return _dim_around(before), f"before {type(before).__name__}"
    return -1, "with nothing around it that tells"


def _deciding(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what tells where units are, in the order of definition."""
    return (part for part in module.modules() if isinstance(part, FEATURES_LAST + CHANNELS_SECOND))


def _dim_around(module: nn.Module) -> int:
    return 1 if isinstance(module, CHANNELS_SECOND) else -1


def _twin(module: nn.Module, unit_dim: int) -> ConductanceDropout:
    """Make the layer that stands for a dropout of torch's."""
    twin = ConductanceDropout(module.p, unit_dim, elementwise=type(module) is nn.Dropout)  # type: ignore[arg-type]
    twin.replaced = (module,)
    twin.training = module.training
    return twin


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).register_module(child, module)
