"""Places of Transformers: queries, keys, values, attention weights, output projection, residual and feed-forward."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_ydrop.layers.surroundings import drops_attention_weights
from lightning_ydrop.search.calls import Uses, uses_of
from lightning_ydrop.search.layout import CONTAINERS, Layout, is_inside, is_ordinary_dropout
from lightning_ydrop.search.reports import Place

SUBLAYERS = ("queries", "keys", "values", "attention", "projection", "residual", "feed_forward")
# Names of the layers of attention in the libraries that we know.
SEPARATE = {
    "queries": re.compile(r"q|w_?qs?|query|queries|(query|q)_(proj|lin|linear|layer)|to_q|linear_q"),
    "keys": re.compile(r"k|w_?ks?|key|keys|(key|k)_(proj|lin|linear|layer)|to_k|linear_k"),
    "values": re.compile(r"v|w_?vs?|value|values|(value|v)_(proj|lin|linear|layer)|to_v|linear_v"),
}
PACKED = re.compile(r"w?qkv|(to|in|attn|c)_?qkv|qkv_(proj|linear)|c_attn|in_proj|query_key_value|(to_|c_)?kv|kv_proj")
PROJECTION = re.compile(r"proj|out|o|(out|o|c|output)_?(proj|lin|linear)|wo|w_o|fc|dense|to_out|linear_out")
ACTIVATION = re.compile(r"act(ivation)?(_?fn)?\d*|\w+_act(_fn)?")
# Windows of images: their tensors are (B, H, W, C).
OF_WINDOWS = re.compile(r"swin|window|maxvit")
PROJECTS_INSIDE = "nn.MultiheadAttention projects inside: its output is at `residual`"


@dataclass
class _Found:
    """What a block has at each place: names of modules, or why there are none."""

    name: str
    modules: dict[str, list[str]] = field(default_factory=lambda: {each: [] for each in SUBLAYERS})
    reasons: dict[str, str] = field(default_factory=dict)


def token_places(layout: Layout, per_block: bool) -> tuple[list[Place], dict[str, str]]:
    """Find where patterns of tokens go.

    Args:
        layout: The modules of a model.
        per_block: Whether each block has places of its own.

    Returns:
        The places in order, and what is not reached, with the reason.

    """
    blocks = [_explore(layout, name, attentions) for name, attentions in _blocks(layout).items()]
    places: list[Place] = []
    not_reached: dict[str, str] = {}
    for sublayer in SUBLAYERS:
        reached = [block for block in blocks if block.modules[sublayer]]
        reasons = {block.name: block.reasons[sublayer] for block in blocks if sublayer in block.reasons}
        if reasons and not reached:
            not_reached[sublayer] = "; ".join(dict.fromkeys(reasons.values()))
        else:
            not_reached |= {f"{sublayer} of {name}": why for name, why in reasons.items()}
        if reached and not per_block:
            modules = tuple(name for block in reached for name in block.modules[sublayer])
            places.append(Place(sublayer, "token", modules, (), f"in {len(reached)} block(s)"))
    if per_block:
        for number, block in enumerate(blocks, 1):
            places += [
                Place(
                    f"block{number}.{sublayer}", "token", tuple(modules), (), f"in {block.name or 'the model itself'}"
                )
                for sublayer, modules in block.modules.items()
                if modules
            ]
    return places, not_reached | _unknown_attention(layout)


def _unknown_attention(layout: Layout) -> dict[str, str]:
    """Name classes that are called attention, and in which none of its layers is known."""
    known = [name for name in layout.modules if _is_attention(layout, name)]
    unknown: dict[str, str] = {}
    for name, module in layout.modules.items():
        kind = type(module).__name__
        called_so = re.search(r"attention|attn", kind.lower()) is not None and bool(module._modules)
        if called_so and not any(is_inside(each, name) or is_inside(name, each) for each in known):
            unknown.setdefault(kind, name)
    return {f"{name} ({kind})": "its layers are not known by name" for kind, name in unknown.items()}


def _blocks(layout: Layout) -> dict[str, list[str]]:
    """Find the blocks of Transformers by name, each with its layers of attention."""
    attentions = [name for name in layout.modules if _is_attention(layout, name)]
    # Attention that holds attention, such as a wrapper around nn.MultiheadAttention, counts once.
    attentions = [name for name in attentions if not any(is_inside(each, name) and each != name for each in attentions)]
    blocks: dict[str, list[str]] = {}
    for attention in attentions:
        blocks.setdefault(_block_of(layout, attention, attentions), []).append(attention)
    return dict(sorted(blocks.items(), key=lambda block: layout.position(block[0])))


def _is_attention(layout: Layout, name: str) -> bool:
    module = layout[name]
    if isinstance(module, nn.MultiheadAttention):
        return True
    children = [called for called, child in module._modules.items() if child is not None and is_linear(child)]
    separate = all(any(pattern.fullmatch(called) for called in children) for pattern in SEPARATE.values())
    packed = [called for called in children if PACKED.fullmatch(called.lower()) and _packs(module, called)]
    return separate or bool(packed)


def _packs(module: nn.Module, called: str) -> bool:
    """Tell whether a layer makes queries, keys and values. Mamba's `in_proj`, for one, makes a state and its gate."""
    inner, outer = _sizes(module._modules[called])  # type: ignore[arg-type]
    return called.lower() != "in_proj" or outer == 3 * inner or "att" in type(module).__name__.lower()


def _block_of(layout: Layout, attention: str, attentions: list[str]) -> str:
    """Find the block that a layer of attention stands in: the one item of a container that has a feed-forward too."""
    closest = None
    name = attention
    while True:
        own = [each for each in attentions if is_inside(each, name)]
        if len(own) > 2:
            break
        held = name != "" and isinstance(layout[layout.holder_of(name)], CONTAINERS)
        ready = isinstance(layout[name], (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        alone = closest is None and name == "" == layout.holder_of(attention)
        if held or ready or alone:
            if _feed_forward(layout, name, own) is not None:
                return name
            closest = name if closest is None else closest
        if not name:
            break
        name = layout.holder_of(name)
    return attention if closest is None else closest


def _feed_forward(layout: Layout, block: str, attentions: Iterable[str]) -> tuple[list[str], str] | None:
    """Find the linear layers of a feed-forward: those that widen, and the one that narrows."""
    linears = [
        name
        for name in in_order_of_calls(layout, block)
        if is_linear(layout[name]) and not any(is_inside(name, each) for each in attentions)
    ]
    if len(linears) < 2:
        return None
    inner, _ = _sizes(layout[linears[-1]])
    widening = [name for name in linears[:-1] if _sizes(layout[name])[1] in (inner, 2 * inner)]
    return (widening, linears[-1]) if widening else None


def _explore(layout: Layout, name: str, attentions: list[str]) -> _Found:
    """Find what a block has at each place."""
    found = _Found(name)
    if any(OF_WINDOWS.search(type(layout[each]).__name__.lower()) for each in [name, *attentions]):
        found.reasons = dict.fromkeys(SUBLAYERS, "it works on windows of (B, H, W, C), and a TokenPattern on (B, T, C)")
        return found
    if not all(getattr(layout[each], "batch_first", True) for each in attentions):
        found.reasons = dict.fromkeys(SUBLAYERS, "its tensors are (T, B, C): build it with batch_first=True")
        return found
    feed_forward = _feed_forward(layout, name, attentions)
    for attention in attentions:
        _explore_attention(layout, found, attention, feed_forward)
    if isinstance(layout[name], (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        held = [f"dropout{number}" for number in (1, 2, 3) if hasattr(layout[name], f"dropout{number}")]
        found.modules["residual"] = [f"{name}.{called}" if name else called for called in held]
        found.modules["feed_forward"] = [f"{name}.dropout" if name else "dropout"]
    elif feed_forward is None:
        found.reasons["feed_forward"] = "no pair of linear layers beside the attention is known to be one"
    else:
        _explore_feed_forward(layout, found, *feed_forward)
    if not found.modules["residual"]:
        found.reasons["residual"] = "no module puts out what is added: mask `projection` and `feed_forward`"
    return found


def _explore_attention(
    layout: Layout, found: _Found, attention: str, feed_forward: tuple[list[str], str] | None
) -> None:
    module = layout[attention]
    if isinstance(module, nn.MultiheadAttention):
        found.reasons |= dict.fromkeys(SEPARATE, "nn.MultiheadAttention makes queries, keys and values in one function")
        found.reasons["attention"] = "nn.MultiheadAttention takes its dropout as a number"
        found.reasons["projection"] = PROJECTS_INSIDE
        _explore_dropout_after(layout, found, attention)
        return
    linears = {called: child for called, child in module._modules.items() if child is not None and is_linear(child)}
    for sublayer, pattern in SEPARATE.items():
        called = next((each for each in linears if pattern.fullmatch(each)), None)
        if called is None:
            found.reasons[sublayer] = f"one layer of {layout.kind(attention)} makes queries, keys and values together"
        else:
            _add(layout, found, sublayer, f"{attention}.{called}")
    _explore_weights(layout, found, attention)
    projection = _projection_of(layout, found.name, attention, feed_forward)
    if projection is None:
        found.reasons["projection"] = f"no layer after {layout.kind(attention)} is known to be it"
        return
    _add(layout, found, "projection", projection)
    _explore_dropout_after(layout, found, projection)


def _explore_weights(layout: Layout, found: _Found, attention: str) -> None:
    """Find the dropout of attention weights."""
    module = layout[attention]
    dropouts = [
        f"{attention}.{called}" if attention else called
        for called, child in module._modules.items()
        if is_ordinary_dropout(child) and drops_attention_weights(module, called)
    ]
    uncalled = [dropout for dropout in dropouts if not is_called(*layout.holders[dropout])]
    if not dropouts:
        found.reasons["attention"] = f"no module of {layout.kind(attention)} drops attention weights"
    elif uncalled:
        _add(layout, found, "attention", uncalled[0])
    elif getattr(module, "fused_attn", False):
        found.reasons["attention"] = "fused attention takes its dropout as a number: set fused_attn = False"
    elif getattr(getattr(module, "config", None), "_attn_implementation", "eager") != "eager":
        found.reasons["attention"] = (
            'this attention takes its dropout as a number: load the model with attn_implementation="eager"'
        )
    for dropout in dropouts if "attention" not in found.reasons else ():
        _add(layout, found, "attention", dropout)


def _projection_of(
    layout: Layout, block: str, attention: str, feed_forward: tuple[list[str], str] | None
) -> str | None:
    """Find the output projection: in the attention, or the first linear layer after it."""
    for called, child in layout[attention]._modules.items():
        if child is not None and PROJECTION.fullmatch(called):
            inner = f"{attention}.{called}" if attention else called
            linears = [name for name in layout.inside(inner) if is_linear(layout[name])]
            if linears:
                return linears[0]
    others = {*feed_forward[0], feed_forward[1]} if feed_forward else set()
    closest = next((name for name in _after(layout, block, attention) if is_linear(layout[name])), None)
    return None if closest in others else closest


def _explore_dropout_after(layout: Layout, found: _Found, name: str) -> bool:
    """Find the dropout of what is added: after a layer, in a module that holds it, before another layer."""
    for each in _after(layout, found.name, name):
        if is_linear(layout[each]):
            return False
        if (
            is_ordinary_dropout(layout[each])
            and is_inside(name, layout.holder_of(each))
            and not drops_attention_weights(*layout.holders[each])
        ):
            _add(layout, found, "residual", each)
            return True
    return False


def _explore_feed_forward(layout: Layout, found: _Found, widening: list[str], narrowing: str) -> None:
    """Find the hidden layer of a feed-forward, and its output."""
    between = _after(layout, found.name, widening[0])
    between = between[: between.index(narrowing)]
    dropouts = [name for name in between if is_ordinary_dropout(layout[name])]
    activations = [
        name for name in between if ACTIVATION.fullmatch(name.rpartition(".")[2]) or _is_activation(layout[name])
    ]
    _add(layout, found, "feed_forward", [*dropouts[-1:], *activations[-1:], widening[0]][0])
    if not _explore_dropout_after(layout, found, narrowing):
        _add(layout, found, "residual", narrowing)


def in_order_of_calls(layout: Layout, block: str) -> list[str]:
    """List the modules in a module, in the order in which code calls them, or else of their definition."""

    def rank(name: str) -> tuple[tuple[int, int], ...]:
        ranks = []
        while name != block:
            holder, called = layout.holders[name]
            uses = None if isinstance(holder, CONTAINERS) else _uses_of(holder)
            order = uses.called.index(called) if uses is not None and called in uses.called else len(layout.modules)
            ranks.append((order, layout.position(name)))
            name = layout.holder_of(name)
        return tuple(reversed(ranks))

    return sorted(layout.inside(block), key=rank)


def _after(layout: Layout, block: str, name: str) -> list[str]:
    """List the modules of a block that are called after another one."""
    ordered = in_order_of_calls(layout, block)
    inside = [position for position, each in enumerate(ordered) if is_inside(each, name)]
    return ordered[inside[-1] + 1 :]


def _add(layout: Layout, found: _Found, sublayer: str, name: str) -> None:
    """Add a module to a place if the forward that holds it calls it."""
    if is_called(*layout.holders[name]):
        found.modules[sublayer].append(name)
    else:
        holder, called = layout.holders[name]
        found.reasons[sublayer] = f"{type(holder).__name__} reads attributes of `{called}` and never calls it"


def is_called(holder: nn.Module, called: str) -> bool:
    """Tell whether the code of a class may call a module that it holds, and does not only read attributes of it."""
    uses = None if isinstance(holder, CONTAINERS) else _uses_of(holder)
    if uses is None or called in uses.called:
        return True
    return all(name != called for name, _ in uses.read)


def _uses_of(holder: Any) -> Uses | None:
    cls: Any = type(holder)
    return uses_of(cls)


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module maps the last dimension linearly: nn.Linear, or Transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Give the numbers of features that a linear layer takes and puts out."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(getattr(module, "nx", 0)), int(getattr(module, "nf", 0))


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention)
