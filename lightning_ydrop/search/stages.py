"""The stages of a network: blocks in a row that work on maps of one size and width."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from lightning_ydrop.search.layout import CONTAINERS, Layout, stride_of, width_of


def name_stages(layout: Layout, blocks: Sequence[tuple[Sequence[str], str]], by_width: bool) -> list[str]:
    """Name blocks by stage and order: "stage2.1" is the first block of the second stage.

    A stage begins where maps get smaller, and, with `by_width` or where they never do, where their channels change in
    number. It also begins with another container, if that holds several blocks.

    Args:
        layout: The modules of the model.
        blocks: In the order of definition: names of the modules that make a block, the first of which says where it
            stands, and of the one whose channels are its width.
        by_width: Whether a change of width begins a stage.

    Returns:
        A name for each block.

    """
    smaller = sorted(
        layout.position(name)
        for name, module in layout.modules.items()
        if stride_of(module) > 1 and not layout.is_in_gate(name)
    )
    ends = [max(layout.ends_at(each) for each in parts) for parts, _ in blocks]
    shrinks = [False]
    shrinks += [any(start < each <= end for each in smaller) for start, end in pairwise(ends)]
    widths = [width_of(layout[last]) for _, last in blocks]
    widens = [False] + [one != other for one, other in pairwise(widths)]
    containers = [_container_of(layout, parts[0]) for parts, _ in blocks]
    sizes = Counter(containers)
    by_width = by_width or not any(shrinks)
    names, stage, order = [], 1, 0
    for position, container in enumerate(containers):
        moved = position > 0 and container != containers[position - 1]
        apart = moved and by_width and max(sizes[container], sizes[containers[position - 1]]) > 1
        if shrinks[position] or (by_width and widens[position]) or apart:
            stage, order = stage + 1, 0
        order += 1
        names.append(f"stage{stage}.{order}")
    return names


def _container_of(layout: Layout, name: str) -> str:
    """Name the container that a block stands in, the model itself where there is none."""
    while name:
        name = layout.holder_of(name)
        if isinstance(layout[name], CONTAINERS):
            return name
    return name
