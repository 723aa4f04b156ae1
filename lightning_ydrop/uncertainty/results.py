"""What an average over dropout masks says, for each task."""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.functional.uncertainty import bernoulli_entropy, predictive_entropy

Kind = TypeVar("Kind", bound="Result")


@dataclass(frozen=True, eq=False)
class Result:
    """Moves to another device as a tensor does, and as `Trainer.predict` asks for it."""

    def to(self: Kind, device: torch.device | str, **settings: Any) -> Kind:
        """Give a copy on a device.

        Args:
            device: The device, or a dtype, as `Tensor.to` takes it.
            **settings: Passed on to `Tensor.to`.

        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, **settings) for name, value in tensors.items()})


@dataclass(frozen=True, eq=False)
class Discrete(Result):
    """The average of probabilities over masks, and how much of its uncertainty is due to the masks.

    Attributes:
        probabilities: Their average.
        num_samples: The number of masks.
        samples: The probabilities of each mask, with masks in dimension 0, or None.
        entropy_of_masks: Behind `expected_entropy`; None where that is unknown.

    """

    probabilities: Tensor
    num_samples: int
    samples: Tensor | None = None
    entropy_of_masks: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The average prediction: `probabilities`."""
        return self.probabilities

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty in nats: the entropy of the average prediction."""
        raise NotImplementedError

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric uncertainty in nats: the entropy of each mask's prediction, averaged over the masks.

        What remains of it with any amount of training data is in the data: classes that overlap, labels that are wrong.

        Raises:
            ConfigurationError: If the object was made without `entropy_of_masks`.

        """
        if self.entropy_of_masks is None:
            kind = type(self).__name__
            raise ConfigurationError(
                f"{kind}(probabilities, num_samples) was made by hand.",
                "The average alone doesn't tell what the single masks predict.",
                f"Take what `monte_carlo` returns, or pass {kind}(..., entropy_of_masks=...).",
            )
        return self.entropy_of_masks

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty in nats: `entropy - expected_entropy`, at least 0 (BALD; Houlsby et al., 2011).

        It is 0 where all masks predict the same, and high where each mask is sure of something else.
        """
        # Jensen's inequality holds up to rounding.
        return (self.entropy - self.expected_entropy).clamp(min=0)


@dataclass(frozen=True, eq=False)
class MonteCarlo(Discrete):
    """The average prediction of a classifier over its masks.

    Attributes:
        probabilities: Of the classes, float32, shape (B, C, *). In float64 where the model's output is.
        num_samples: The number of masks, T.
        samples: The probabilities that each mask gives, shape (T, B, C, *), or None if they were not asked for.
        entropy_of_masks: What `expected_entropy` returns, shape (B, *), or None in an object made without it.

    """

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty in nats, shape (B, *): the entropy of the average prediction."""
        return predictive_entropy(self.probabilities)


@dataclass(frozen=True, eq=False)
class MonteCarloMultilabel(Discrete):
    """The average prediction over masks, of labels that each apply or not. All uncertainties are for each label.

    Attributes:
        probabilities: That each label applies, float32, in the shape of the model's output, such as (B, L). In float64
            where the output is.
        num_samples: The number of masks, T.
        samples: The probabilities that each mask gives, shape (T, B, L), or None if they were not asked for.
        entropy_of_masks: What `expected_entropy` returns, shape (B, L), or None in an object made without it.

    """

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty in nats, of each label: the entropy of the average prediction."""
        return bernoulli_entropy(self.probabilities)


@dataclass(frozen=True, eq=False)
class MonteCarloRegression(Result):
    """The average prediction of numbers over masks, and its variance.

    Attributes:
        mean: Of the predicted means over masks, float32, in the shape of the model's output, such as (B, K). In float64
            where the output is.
        epistemic_variance: How far the masks disagree: the variance of the means over masks, divided by their number T.
        aleatoric_variance: The noise of the targets: the mean over masks of the variances that the model predicts. None
            if the model predicts no variance.
        num_samples: The number of masks, T.
        samples: The means of each mask, shape (T, B, K), or None if they were not asked for.
        variance_samples: The variances that each mask predicts, shape (T, B, K), or None.

    """

    mean: Tensor
    epistemic_variance: Tensor
    aleatoric_variance: Tensor | None
    num_samples: int
    samples: Tensor | None = None
    variance_samples: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """Total variance, that of the mixture of all masks' predictions: `epistemic_variance + aleatoric_variance`.

        Without predicted variances it is the epistemic part alone: the noise of the targets is not in it.
        """
        if self.aleatoric_variance is None:
            return self.epistemic_variance
        return self.epistemic_variance + self.aleatoric_variance
