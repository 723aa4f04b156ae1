"""Places of ConvNets: residual blocks, or single batch norms and convolutions where there are none."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from lightning_ydrop.search.joins import OF_SHORTCUT, Join, find_dormant_shortcut, find_joins
from lightning_ydrop.search.layout import CONTAINERS, Layout, has_own_forward, is_batch_norm, is_inside
from lightning_ydrop.search.reports import Place
from lightning_ydrop.search.stages import name_stages


@dataclass(frozen=True)
class _Block:
    """A residual block.

    Attributes:
        name: Of the module, or of the first masked module where the block is a part of a forward.
        modules: Masked.
        shortcuts: Masked too, where a pattern says so.
        last: Its last batch norm or convolution, whose channels are its width.
        kind: What to call it.
        unreached: Why its shortcut cannot be masked. None if it can.

    """

    name: str
    modules: tuple[str, ...]
    shortcuts: tuple[str, ...]
    last: str
    kind: str
    unreached: str | None


def conv_places(layout: Layout, has_tokens: bool) -> tuple[list[Place], dict[str, str]]:
    """Find where patterns of maps go.

    Args:
        layout: The modules of a model.
        has_tokens: Whether the model is a Transformer too, whose convolutions make tokens.

    Returns:
        The places in order, and what is not reached, with the reason.

    """
    blocks = _residual_blocks(layout)
    not_reached = {f"the shortcut of {each.name}": each.unreached for each in blocks if each.unreached is not None}
    if not blocks:
        places, others = _plain_places(layout, has_tokens)
        return places, not_reached | others
    norms = bool(layout.batch_norms(name for block in blocks for name in block.modules))
    after = "after batch normalisation" if norms else "after convolutions, as it has no batch norms"
    parts = [
        ((each.name, *each.modules, *(name for name in each.shortcuts if name in layout.modules)), each.last)
        for each in blocks
    ]
    names = name_stages(layout, parts, by_width=True)
    places = [
        Place(name, "conv", block.modules, block.shortcuts, f"{block.kind} {block.name}, {after}")
        for name, block in zip(names, blocks, strict=True)
    ]
    covered = [each for block in blocks for each in (block.name, *block.modules, *block.shortcuts)]
    for name in layout.maskable(layout.modules):
        if not any(is_inside(name, each) for each in covered):
            not_reached[name] = "it lies outside of the residual blocks"
    return places, not_reached


def _residual_blocks(layout: Layout) -> list[_Block]:
    """Find the blocks: the innermost modules that add a path with norms or convolutions to a shortcut."""
    kinds = Counter(type(module) for module in layout.modules.values())
    blocks: dict[str, list[_Block]] = {}
    without: list[str] = []
    for name in sorted(layout.modules, key=lambda name: -name.count(".") if name else 1):
        module = layout[name]
        inside = layout.inside(name)
        if len(inside) < 2 or not has_own_forward(module) or is_batch_norm(module) or layout.is_in_gate(name):
            continue
        if not layout.maskable(inside):
            continue
        if any(is_inside(each, name) for each in blocks):
            continue
        held = name != "" and isinstance(layout[layout.holder_of(name)], CONTAINERS)
        found = _blocks_of(layout, name, whole=held or kinds[type(module)] > 1)
        if found:
            blocks[name] = found
        else:
            without.append(name)
    kinds_of_blocks = {type(layout[name]) for name in blocks}
    for name in without:
        if type(layout[name]) in kinds_of_blocks and not any(is_inside(each, name) for each in blocks):
            inside = layout.inside(name)
            modules, kind = tuple(layout.maskable(inside)), layout.kind(name)
            blocks[name] = [_Block(name, modules, (), _last(layout, inside), kind, f"this {kind} has no shortcut")]
    return sorted((block for found in blocks.values() for block in found), key=lambda each: layout.position(each.name))


def _blocks_of(layout: Layout, name: str, whole: bool) -> list[_Block]:
    """Find the blocks in the forward of a module.

    Args:
        layout: The modules of the model.
        name: Of the module.
        whole: Whether the module is one block, if it has one shortcut. Otherwise it may be a network with a block in
            its forward.

    """
    joins = find_joins(layout[name])
    if joins is None:
        return _block_by_names(layout, name)
    prefix = f"{name}." if name else ""
    branches = [[each for called in join.branch for each in layout.inside(prefix + called)] for join in joins]
    masked = [layout.maskable(branch) for branch in branches]
    alone = sum(map(bool, masked)) == 1
    found = []
    for join, branch, modules in zip(joins, branches, masked, strict=True):
        if not modules:
            continue
        shortcuts, why_not = _shortcut_of(layout, name, join, alone)
        if whole and alone:
            beside = [prefix + called for called in join.shortcut]
            inside = [each for each in layout.inside(name) if not any(is_inside(each, side) for side in beside)]
            masks, last, kind = tuple(layout.maskable(inside)), _last(layout, inside), layout.kind(name)
            found.append(_Block(name, masks, shortcuts, last, kind, why_not))
        else:
            kind = f"a path of {layout.kind(name)} that begins at"
            last = _last(layout, branch)
            found.append(_Block(prefix + join.branch[0], tuple(modules), shortcuts, last, kind, why_not))
    return found


def _shortcut_of(layout: Layout, name: str, join: Join, alone: bool) -> tuple[tuple[str, ...], str | None]:
    """Find what to mask on a shortcut, or say why nothing there can be masked."""
    prefix = f"{name}." if name else ""
    kind = layout.kind(name)
    if join.shortcut:
        return (prefix + join.shortcut[-1],), None
    if not join.is_told:
        return (), f"{kind} adds two paths, and neither of them is known to be the shortcut"
    if alone and (called := find_dormant_shortcut(layout[name])) is not None:
        return (prefix + called,), None
    return (), (
        f"forward of {kind} adds the shortcut in code: no module is called on it; write self.shortcut = nn.Identity() "
        "in the constructor, and add self.shortcut(x) in forward"
    )


def _block_by_names(layout: Layout, name: str) -> list[_Block]:
    """Take a module that torch.fx can't trace for a block if it holds a shortcut, by name."""
    module = layout[name]
    held = {**vars(module), **module._modules}
    called = next(
        (
            each
            for each, value in held.items()
            if OF_SHORTCUT.fullmatch(each) and (value is None or (isinstance(value, nn.Module) and callable(value)))
        ),
        None,
    )
    if called is None or isinstance(held[called], (nn.ModuleList, nn.ModuleDict)):
        return []
    shortcut = f"{name}.{called}" if name else called
    inside = [each for each in layout.inside(name) if not is_inside(each, shortcut)]
    modules = tuple(layout.maskable(inside))
    kind = f"{layout.kind(name)}, whose shortcut is told by its name,"
    return [_Block(name, modules, (shortcut,), _last(layout, inside), kind, None)] if modules else []


def _last(layout: Layout, names: list[str]) -> str:
    return max(layout.batch_norms(names) + layout.convolutions(names), key=layout.position)


def _plain_places(layout: Layout, has_tokens: bool) -> tuple[list[Place], dict[str, str]]:
    """Give each batch norm a place, or each convolution of a network without any."""
    norms = layout.batch_norms(layout.modules)
    not_reached = {}
    modules = norms
    if not norms:
        modules = layout.convolutions(layout.modules)
        if modules and not any(
            isinstance(module, nn.Linear) and layout.position(name) > layout.position(modules[-1])
            for name, module in layout.modules.items()
        ):
            not_reached[modules.pop()] = "it makes the output"
        embedding = [name for name in modules if has_tokens or layout.is_in_embedding(name)]
        not_reached |= dict.fromkeys(embedding, "it makes tokens of maps")
        modules = [name for name in modules if name not in embedding]
    why = "after batch normalisation" if norms else "after a convolution, as there is no batch norm"
    names = name_stages(layout, [((name,), name) for name in modules], by_width=False) if modules else []
    places = [Place(name, "conv", (module,), (), why) for name, module in zip(names, modules, strict=True)]
    return places, not_reached
