"""The ways in which the tensors of a batch can be read."""

import itertools

from lightning_ydrop.importance.arrangement import FIXED, Batch, Role

# Ways to read the arguments that are tried, where their shapes allow for several.
MOST_ROLES = 9


def possible_roles(batch: Batch) -> list[tuple[Role, ...]]:
    """List what tensors may be: first as they were arranged, then with samples elsewhere, or without samples.

    A tensor may have as many entries as there are samples by coincidence, as a mask (T, T) or positions (T,) may.
    """
    carried, options = iter(batch.carried), []
    for role in batch.call.roles:
        others: list[Role] = []
        if role.kind == "carried":
            # The samples are in front by now, and `role.dim` is where they were.
            has_them_first = next(carried).movedim(0, role.dim).shape[0] == batch.size
            others = [*([Role("carried")] if has_them_first else []), FIXED]
        options.append(dict.fromkeys([role, *others]))
    return list(itertools.islice(itertools.product(*options), MOST_ROLES))
