"""Why all units of a layer have the same score in a first batch, and what to do."""

import warnings
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lightning_ydrop.errors import NoEffectWarning, listed
from lightning_ydrop.models.modules import by_likeness_to_words, named_modules

# No more layers than this go into a message.
MOST_LAYERS = 3
WITH_A_WEIGHT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def warn_of_equal_scores(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    output: Tensor,
    interpolate_at: str | None,
    not_after: Collection[str],
) -> None:
    """Name the layers whose units can't be ranked, with the cause where one is seen.

    Args:
        model: The model.
        scores: Of each layer by name, (N, U).
        output: The model's output for the first batch, (B, *).
        interpolate_at: Name of the module whose outputs the paths run through, or None.
        not_after: Names of the layers that have run when that module has.

    """
    means = {name: values.mean(0) for name, values in scores.items() if values.shape[1] > 1}
    alike = [name for name, mean in means.items() if mean.std() == 0]
    if alike and len(output) > 1 and bool((output == output[:1]).all()):
        zero = [
            name
            for name, module in named_modules(model).items()
            if isinstance(module, WITH_A_WEIGHT) and not bool(module.weight.any())
        ]
        if zero:
            _warn(
                alike,
                f"since the output is the same for all samples: the weights of {_some(zero)} are all 0. "
                "Scores differ as soon as training has moved these weights; until then probabilities stay what they "
                "are. If they start at 0 on purpose, as in torchvision's VisionTransformer, there is nothing to do.",
            )
            return
    if interpolate_at is not None and (early := [name for name in alike if name in not_after]):
        _warn(
            early,
            f"since paths start at the outputs of {interpolate_at!r}, inside or before which these layers run. "
            "Their probabilities stay at the start. "
            f"Name a module that runs before them{_example(model, interpolate_at)}, or leave them out of the "
            "conversion with `exclude`.",
        )
        alike = [name for name in alike if name not in early]
    if alike:
        _warn(
            alike,
            "units that do not differ are ranked by their position, or where the score is 0 their probabilities stay "
            "what they are. "
            "The objective may not depend on these layers, the labels of these samples may not count, or the "
            "layers run under torch.no_grad() or in activation checkpoints without use_reentrant=False. "
            "See what `layer_conductance` gives for them, or choose another objective.",
        )


def _warn(names: list[str], text: str) -> None:
    warnings.warn(
        f"All units of {_some(names)} have the same score in the first batch{',' if text[:5] == 'since' else ':'} "
        f"{text}",
        NoEffectWarning,
        stacklevel=6,
    )


def _some(names: list[str]) -> str:
    return listed(map(repr, names), MOST_LAYERS)


def _example(model: nn.Module, interpolate_at: str) -> str:
    """Name the embedding inside the module, that of words if there are several."""
    inside = {
        name: module
        for name, module in named_modules(model).items()
        if isinstance(module, nn.Embedding) and name.startswith(f"{interpolate_at}.")
    }
    return f", such as interpolate_at={by_likeness_to_words(inside)[0]!r}" if inside else ""
