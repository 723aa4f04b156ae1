"""What is averaged over masks for each task, and what comes of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_ydrop.checks import check_choice, check_class_dim
from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.functional.uncertainty import bernoulli_entropy, predictive_entropy
from lightning_ydrop.uncertainty.outputs import ALIKE, OF_CLASSES, Dims, Noise, logits_of, mean_and_noise, precise
from lightning_ydrop.uncertainty.results import MonteCarlo, MonteCarloMultilabel, MonteCarloRegression

TaskName = Literal["classification", "regression", "multilabel"]
AnyResult = MonteCarlo | MonteCarloMultilabel | MonteCarloRegression


@dataclass(frozen=True)
class Average:
    """What the passes of all masks have in common.

    Attributes:
        means: The mean over masks of each quantity that a task reads, shape (B, *).
        variances: The variance over masks of those that the task names in `varying`.
        samples: What each mask gave, shape (T, B, *), of those that the task names in `sampled`. Empty if not wanted.
        num_samples: The number of masks, T.

    """

    means: Mapping[str, Tensor]
    variances: Mapping[str, Tensor]
    samples: Mapping[str, Tensor]
    num_samples: int


class Task(ABC):
    """What is read from an output, mask by mask, and what the average of it says."""

    dims: Dims
    sampled: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()

    @abstractmethod
    def read(self, output: Any, num_rows: int) -> dict[str, Tensor]:
        """Take what is averaged out of a model's output, each with a row for each row that went in."""


class Averaged(Task):
    """A task that `monte_carlo` knows by its name."""

    @abstractmethod
    def result(self, average: Average) -> AnyResult:
        """Say what the average tells."""

    @abstractmethod
    def output(self, result: Any, form: Any, num_rows: int) -> Any:
        """Give the average as an output of the model would look, of its dtype too: losses and metrics take it for one.

        Args:
            result: What `result` gave.
            form: Any output of the model.
            num_rows: For how many rows it is.

        Raises:
            ConfigurationError: If such an output can't be made, because it holds more than predictions.

        """


@dataclass(frozen=True)
class Probabilities(Task):
    """The probabilities of classes alone, at a temperature."""

    dims: Dims = OF_CLASSES
    temperature: float = 1.0

    def read(self, output: Any, num_rows: int) -> dict[str, Tensor]:
        """Take the softmax of the logits."""
        return {"probabilities": (logits_of(output, num_rows, self.dims) / self.temperature).softmax(1)}


@dataclass(frozen=True)
class Classification(Averaged):
    """One class of several."""

    dims: Dims = OF_CLASSES
    sampled = ("probabilities",)

    def read(self, output: Any, num_rows: int) -> dict[str, Tensor]:
        """Take the probabilities, and their entropy."""
        probabilities = logits_of(output, num_rows, self.dims).softmax(1)
        return {"probabilities": probabilities, "entropy": predictive_entropy(probabilities)}

    def result(self, average: Average) -> MonteCarlo:
        """Say how sure the average is, and how far its masks agree."""
        return MonteCarlo(
            average.means["probabilities"],
            average.num_samples,
            average.samples.get("probabilities"),
            average.means["entropy"],
        )

    def output(self, result: MonteCarlo, form: Any, num_rows: int) -> Tensor:
        """Give the logits of the average: their softmax is the average itself."""
        form = _checked_tensor(form)
        tiny = torch.finfo(result.probabilities.dtype).tiny
        logits = result.probabilities.clamp(min=tiny).log()
        return self.dims.back(logits.movedim(1, self.dims.of_classes(form, num_rows)), form, num_rows)


@dataclass(frozen=True)
class Multilabel(Averaged):
    """Labels that each apply or not: a logit for each."""

    dims: Dims = ALIKE
    sampled = ("probabilities",)

    def read(self, output: Any, num_rows: int) -> dict[str, Tensor]:
        """Take the probabilities, and their entropy."""
        probabilities = precise(self.dims.rows_first(output, num_rows)).sigmoid()
        return {"probabilities": probabilities, "entropy": bernoulli_entropy(probabilities)}

    def result(self, average: Average) -> MonteCarloMultilabel:
        """Say how sure the average is of each label, and how far its masks agree."""
        return MonteCarloMultilabel(
            average.means["probabilities"],
            average.num_samples,
            average.samples.get("probabilities"),
            average.means["entropy"],
        )

    def output(self, result: MonteCarloMultilabel, form: Any, num_rows: int) -> Tensor:
        """Give the logits of the average: their sigmoid is the average itself."""
        form = _checked_tensor(form)
        logits = torch.logit(result.probabilities, eps=torch.finfo(result.probabilities.dtype).eps)
        return self.dims.back(logits, form, num_rows)


@dataclass(frozen=True)
class Regression(Averaged):
    """Numbers, perhaps with the variance of each."""

    noise: Noise | None = None
    dims: Dims = ALIKE
    sampled = ("mean", "variance")
    varying = ("mean",)

    def read(self, output: Any, num_rows: int) -> dict[str, Tensor]:
        """Take the mean, and the variance where the model predicts one."""
        if self.noise is None:
            return {"mean": precise(self.dims.rows_first(output, num_rows))}
        mean, variance = mean_and_noise(output, num_rows, self.noise, self.dims)
        return {"mean": mean, "variance": variance}

    def result(self, average: Average) -> MonteCarloRegression:
        """Say how far masks disagree, and what noise they predict."""
        return MonteCarloRegression(
            average.means["mean"],
            average.variances["mean"],
            average.means.get("variance"),
            average.num_samples,
            average.samples.get("mean"),
            average.samples.get("variance"),
        )

    def output(self, result: MonteCarloRegression, form: Any, num_rows: int) -> Any:
        """Give the mean and, where the model predicts a variance, the total variance in its place."""
        if self.noise is None:
            return self.dims.back(result.mean, _checked_tensor(form), num_rows)
        dims = self.dims if isinstance(form, Tensor) else self.dims.alike
        first = form if isinstance(form, Tensor) else form["mean"] if isinstance(form, Mapping) else form[0]
        variance = result.variance.log() if self.noise == "log_variance" else result.variance
        mean, noise = (dims.back(each, first, num_rows) for each in (result.mean, variance))
        if isinstance(form, Mapping):
            return {"mean": mean, self.noise: noise}
        return torch.cat([mean, noise], self.dims.classes or 0) if isinstance(form, Tensor) else (mean, noise)


def task_of(owner: str, name: str, class_dim: int, batch_dim: int, noise: str | None) -> Averaged:
    """Make the task of a name, and refuse settings that belong to another.

    Raises:
        ConfigurationError: If a setting is out of range, or the task does not have it.

    """
    if name == "binary":
        raise ConfigurationError(
            f"{owner}(task='binary') was given.",
            "A single logit for each sample is one label that applies or not.",
            'Pass task="multilabel". Two logits are two classes: task="classification".',
        )
    check_choice(owner, "task", name, get_args(TaskName))
    class_dim = check_class_dim(owner, class_dim)
    if noise is not None:
        check_choice(owner, "noise", noise, get_args(Noise))
        if name != "regression":
            raise ConfigurationError(
                f"{owner}(task={name!r}, noise={noise!r}) was given.",
                "Only a model for regression predicts the noise of its targets.",
                'Leave noise out, or pass task="regression".',
            )
    if class_dim != 1 and (name == "multilabel" or (name == "regression" and noise is None)):
        raise ConfigurationError(
            f"{owner}(task={name!r}, class_dim={class_dim}) was given.",
            "This task treats all entries of the output alike, so it has no dimension of classes.",
            "Leave class_dim out.",
        )
    alike = Dims(None, batch_dim)
    if name == "classification":
        return Classification(Dims(class_dim, batch_dim))
    if name == "multilabel":
        return Multilabel(alike)
    return Regression(None, alike) if noise is None else Regression(noise, Dims(class_dim, batch_dim))  # type: ignore[arg-type]


def _checked_tensor(form: Any) -> Tensor:
    """Refuse outputs of which an average can't be made, since they hold more than predictions.

    Raises:
        ConfigurationError: If it is no tensor.

    """
    if not isinstance(form, Tensor):
        raise ConfigurationError(
            f"The model's forward returned {type(form).__name__}.",
            "An average prediction stands in for an output that is a tensor, for regression with noise also a pair or "
            "a mapping.",
            "Give the LightningModule a method `ydrop_forward` that returns the predictions, and call it in test_step.",
        )
    return form
