"""A student that also says how uncertain it is: how much of its entropy is in the data, how much between the masks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop.checks import check_class_dim, check_module
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.uncertainty import predictive_entropy
from lightning_ydrop.models.calls import read_output
from lightning_ydrop.uncertainty.outputs import precise

# Layers that get one output more. A subclass of them may compute something else.
WIDENED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class StudentWithUncertainty(nn.Module):
    """A network with one output more than there are classes, whose last output `z` divides its uncertainty.

    Of the entropy H of its predictions, `sigmoid(z) H` is aleatoric (what each mask of the teacher is unsure of) and
    `sigmoid(-z) H` is epistemic (what the masks disagree about), in nats. None is below 0, and the sum is H.
    `DropoutDistillation(uncertainty_head=True)` trains it. It exports as any other module.

    Args:
        network: Its forward gives (B, C + 1, *): the logits of C classes, at least two, and z.
        class_dim: Dimension of the classes in its output, -1 for (B, *, C + 1).

    Raises:
        ConfigurationError: If `network` is no module, or `class_dim` is 0. At a call, if its output has fewer than
            three entries there.

    Example:
        >>> student = StudentWithUncertainty(nn.Linear(4, 3 + 1))
        >>> logits, aleatoric, epistemic = student(torch.randn(16, 4))
        >>> logits.shape, aleatoric.shape, epistemic.shape
        (torch.Size([16, 3]), torch.Size([16]), torch.Size([16]))

    """

    def __init__(self, network: nn.Module, class_dim: int = 1) -> None:
        super().__init__()
        check_module("StudentWithUncertainty", network)
        self.class_dim = check_class_dim("StudentWithUncertainty", class_dim)
        self.network = network

    # The first argument has a name: torch.export takes a shape for each argument, and `*inputs` would be one.
    def forward(self, inputs: Any, /, *others: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Call the network.

        Returns:
            The logits, in the network's layout without its last output; the aleatoric and the epistemic uncertainty
            in nats, shape (B, *), float32 or float64.

        """
        return self.divided(self.network(inputs, *others, **keywords))

    def divided(self, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Turn an output of the network into logits, aleatoric and epistemic uncertainty: see `forward`."""
        found = read_output(output)
        dim = self.class_dim
        if not 0 < abs(dim) < found.ndim or found.shape[dim] < 3:
            raise ConfigurationError(
                f"StudentWithUncertainty(class_dim={dim}) holds a network that returned {describe(found)}.",
                "Its output has the logits of two classes or more in that dimension, and one entry more.",
                "Give the network one output more than there are classes, or name their dimension with class_dim.",
            )
        logits, (share,) = found.narrow(dim, 0, found.shape[dim] - 1), precise(found.movedim(dim, 0))[-1:]
        entropy = predictive_entropy(precise(logits.movedim(dim, 1)).softmax(1))
        return logits, entropy * share.sigmoid(), entropy * (-share).sigmoid()


def division_loss(share: Tensor, logits: Tensor, probabilities: Tensor, entropy: Tensor) -> Tensor:
    """Give the loss of z: `-(a log sigmoid(z) + e log sigmoid(-z))`, the mean over samples.

    The cross-entropy between a mask's prediction and the student's is the entropy of the former, whose mean over the
    masks is `a`, and the divergence between the two, whose mean is `e`. At the optimum sigmoid(z) is E[a] / E[a + e].
    Where the student predicts the average over all masks, that is the aleatoric share of the entropy. Both are means
    over masks, so their expectation is the same for any number of masks, even one.

    Args:
        share: z, shape (B, *).
        logits: The student's, shape (B, C, *). They get no gradient.
        probabilities: The teacher's, averaged over some masks, shape (B, C, *).
        entropy: That of each mask's prediction, averaged over the same masks, shape (B, *).

    Returns:
        A scalar, in nats.

    """
    cross_entropy = F.cross_entropy(logits.detach(), probabilities, reduction="none")
    divergence = (cross_entropy - entropy).clamp(min=0)  # Gibbs' inequality holds up to rounding
    return (entropy * F.softplus(-share) + divergence * F.softplus(share)).mean()


def widen(student: nn.Module) -> None:
    """Give the last layer of a student one output more, which is 0 at first, without a change to the others.

    Raises:
        ConfigurationError: If its last linear or convolutional layer computes its weight, or is not to be trained.

    """
    layers = [module for module in student.modules() if isinstance(module, WIDENED)]
    layer = layers[-1] if layers else None
    # A pruned layer has another weight.
    weight = layer._parameters.get("weight") if layer is not None and type(layer) in WIDENED else None
    if layer is None or weight is None or not weight.requires_grad or getattr(layer, "groups", 1) != 1:
        raise ConfigurationError(
            f"DropoutDistillation(uncertainty_head=True) was given {describe(student)}, whose last layer is "
            f"{describe(layer)}.",
            "A copy of the teacher gets one output more if its last layer with weights is a plain nn.Linear or "
            "nn.Conv1d to nn.Conv3d that is trained and neither pruned nor parametrized.",
            "Pass student=..., a network with one output more than the teacher.",
        )
    with torch.no_grad():
        for name in ("weight", "bias"):
            values = layer._parameters.get(name)
            if values is not None:
                more = nn.Parameter(torch.cat([values, torch.zeros_like(values[:1])]), values.requires_grad)
                setattr(layer, name, more)
    if isinstance(layer, nn.Linear):
        layer.out_features += 1
    else:
        layer.out_channels += 1
