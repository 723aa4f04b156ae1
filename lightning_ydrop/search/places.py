"""Where dropout patterns go in a model, and how they get there (AutoDropout, arXiv 2101.01761)."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from lightning_ydrop.checks import check_flag, check_module
from lightning_ydrop.layers.patterns import ConvPattern, Pattern
from lightning_ydrop.models.modules import named_modules
from lightning_ydrop.search.applying import (
    all_or_nothing,
    forget_compiled_code,
    layers_of,
    put_pattern,
    take_out,
    without_patterns,
)
from lightning_ydrop.search.blocks import conv_places
from lightning_ydrop.search.files import as_patterns, read_patterns
from lightning_ydrop.search.fitting import fit_patterns, wants_blocks
from lightning_ydrop.search.layout import Layout, is_ordinary_dropout
from lightning_ydrop.search.reports import PatternReport, Place, PlaceReport
from lightning_ydrop.search.sublayers import token_places

__all__ = ["PatternReport", "Place", "PlaceReport", "apply_patterns", "find_places", "remove_patterns"]

Patterns = Mapping[str, Pattern] | str | Path
# Layers whose outputs are neither maps nor known tokens.
OTHERS = {
    nn.Conv1d: "its outputs are (B, C, L), and a ConvPattern masks maps (B, C, H, W)",
    nn.Conv3d: "its outputs are (B, C, D, H, W), and a ConvPattern masks maps (B, C, H, W)",
    nn.RNNBase: "recurrent layers have no places",
}


def find_places(model: nn.Module, per_block: bool = False) -> PlaceReport:
    """Say where dropout patterns go in a model, and why.

    In a ConvNet one pattern goes to each residual block: after all of its batch norms, and, where a pattern says
    `residual=True`, on its shortcut before the addition. A block is the innermost module that adds a shortcut to a path
    with batch norms or convolutions. torch.fx follows its forward. If it can't, an attribute such as `downsample`,
    `shortcut` or `skip` tells. Networks without blocks have a place after each batch norm. Without batch norms,
    convolutions take their part.

    In a Transformer, patterns go to queries, keys, values, attention weights, the output projection, the residual
    dropout and the hidden layer of the feed-forward, as far as these are modules that get called.

    Places of a ConvNet are named by stage and order: "stage2.1" is the first block of the second stage, in a wider
    network too. A stage begins where maps get smaller, blocks get wider, or another container of blocks begins.

    The model stays as it was. If patterns stand in it, the places are those of the model without them.

    Args:
        model: The model: a network, or a module that holds one.
        per_block: Whether each block of a Transformer has places of its own, such as "block3.queries", instead of one
            set for all.

    Returns:
        The places, and what can't be reached.

    Raises:
        ConfigurationError: If `model` is no module.

    Example:
        >>> print(find_places(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())))
        1 place(s) for patterns, 0 not reached.
          stage1.1: 1; after batch normalisation

    """
    check_module("find_places", model)
    check_flag("find_places", "per_block", per_block)
    with without_patterns(model):
        return _places_of(Layout(model), per_block)


def apply_patterns(model: nn.Module, patterns: Patterns) -> PatternReport:
    """Put dropout patterns at their places in a model. They drop in training mode.

    Parameters, buffers and the state_dict stay what they are. Each masked module holds a `PatternDropout` and applies
    it to what it puts out. Where a place is a dropout layer, or a shortcut that is None or passes its input on, the
    PatternDropout stands there instead. In a ConvNet, the ordinary dropout in a block, or after the masked module, is
    silent while there is a pattern. Dropout elsewhere stays. An empty pattern changes nothing at its place.

    Patterns that stood in the model before are taken out. If an error is raised, the model is as it was.

    Names that count stages and blocks from 1 without gaps are those of a whole network. If the model has as many
    stages, but m blocks in a stage where the names have n, they fit by relative depth: block i of m, counted from 0,
    takes the pattern of block floor(i n / m). Names with gaps, such as "stage3.1" alone, are those of single places.

    Convert or fuse modules before that: `convert_sync_batchnorm` and `fuse_modules` put others where the masked ones
    were. In Trainers `PatternCallback` sees to the former.

    Code that `torch.compile` has compiled before, of this and other models, is compiled again when it next runs.

    Args:
        model: The model. It is changed.
        patterns: By name of the place, or the YAML file that `write_patterns` wrote.

    Returns:
        What was put where, what became of ordinary dropout, and what was left.

    Raises:
        ConfigurationError: If a name is that of no place, the number of stages differs, or a pattern is of the wrong
            kind for its place.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(apply_patterns(model, {"stage1.1": ConvPattern.spatial_dropout(0.1)}))
        1 pattern(s) applied, 0 ordinary dropout layer(s) replaced, 0 left.
          stage1.1: ConvPattern(size=1.0, stride=0.125, repeat=1, rotate=0.0, shear_x=0.0, shear_y=0.0, share_c=False, \
residual=False, rate=0.1)

    """
    check_module("apply_patterns", model)
    by_place = read_patterns(patterns) if isinstance(patterns, (str, Path)) else as_patterns("apply_patterns", patterns)
    with all_or_nothing(model):
        take_out(model)
        layout = Layout(model)
        report = _places_of(layout, wants_blocks(by_place))
        sources = fit_patterns("apply_patterns", report, by_place)
        given = {name: by_place[source] for name, source in sources.items()}
        applied = {name: pattern for name, pattern in given.items() if not pattern.is_empty}
        left = {}
        for name, place in report.places.items():
            pattern = given.get(name)
            if pattern is None or pattern.is_empty:
                left[name] = "no pattern for it was given" if pattern is None else "its pattern is empty"
            elif isinstance(pattern, ConvPattern) and pattern.residual and not place.shortcuts:
                left[f"the shortcut of {name}"] = "it is not reached, so residual=True changes nothing"
        replaced = {
            name: what
            for place, pattern in applied.items()
            for name, what in put_pattern(layout, report.places[place], pattern)
        }
    forget_compiled_code()
    dropouts = [name for name, module in layout.modules.items() if is_ordinary_dropout(module)]
    left |= {name: "it is at no place with a pattern" for name in dropouts if name not in replaced}
    fitted = {name: sources[name] for name in applied} if set(sources) != set(by_place) else {}
    return PatternReport(applied, fitted, replaced, left)


def remove_patterns(model: nn.Module) -> PatternReport:
    """Undo `apply_patterns`: take out all patterns and put back what was there, in the mode in which they stand.

    Args:
        model: The model. It is changed. One without patterns stays as it is.

    Returns:
        What was taken out, and which dropout layers came back.

    Raises:
        ConfigurationError: If `model` is no module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = apply_patterns(model, {"stage1.1": ConvPattern.spatial_dropout(0.1)})
        >>> list(remove_patterns(model).applied)
        ['stage1.1']

    """
    check_module("remove_patterns", model)
    with all_or_nothing(model):
        layers = {id(layer): layer for layer in layers_of(model)}
        taken = take_out(model)
    if taken:
        forget_compiled_code()
    applied = {place: layers[id(module)].pattern for place, module in taken if id(module) in layers}
    names = {id(module): name for name, module in named_modules(model).items()}
    dropouts = [module for _, module in taken if id(module) in names and is_ordinary_dropout(module)]
    return PatternReport(applied, replaced={names[id(each)]: f"{each!r} is back" for each in dropouts}, verb="removed")


def _places_of(layout: Layout, per_block: bool) -> PlaceReport:
    of_tokens, unreached_tokens = token_places(layout, per_block)
    of_maps, unreached_maps = conv_places(layout, bool(of_tokens or unreached_tokens))
    places = {place.name: place for place in [*of_maps, *of_tokens]}
    not_reached = unreached_maps | unreached_tokens | _others(layout)
    if not places and not not_reached:
        kind = type(layout.model).__name__
        not_reached[kind] = "it holds no batch norm or convolution of maps (B, C, H, W), and no attention"
    return PlaceReport(places, not_reached)


def _others(layout: Layout) -> dict[str, str]:
    """Name layers that no pattern is for, one line for each kind."""
    lines = {}
    for kind, why in OTHERS.items():
        names = [name for name, module in layout.modules.items() if isinstance(module, kind)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines[f"{names[0] or 'the model itself'} ({layout.kind(names[0])}){more}"] = why
    return lines
