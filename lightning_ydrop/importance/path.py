"""The settings of a path, checked where they are made."""

from dataclasses import dataclass, field
from typing import Literal

from lightning_ydrop.checks import check_choice, check_count
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.attribution import QUADRATURES, Quadrature
from lightning_ydrop.importance.baseline import Baseline, check_baseline
from lightning_ydrop.importance.objectives import Objective, TargetLogit, check_objective

NumSamples = int | Literal["all"] | None


@dataclass(frozen=True)
class PathSettings:
    """How conductance is measured: along which paths, and of what.

    Args:
        owner: What the user called, for error messages.
        n_steps: S, steps on each path, at least 1.
        num_samples: Samples drawn from a batch, at least 1, or "all". None takes as many as the batch has rows for.
        baseline: Where the paths start.
        quadrature: Where on each step the gradient is taken.
        objective: F, what is differentiated.
        interpolate_at: Name of the module whose outputs the paths run through; None for paths through the inputs.
        batch_dim: The dimension of the samples in inputs, targets, outputs and layers.
        task_is_named: Whether the user has chosen the objective. Otherwise a first batch is refused that looks like
            another task.

    Raises:
        ConfigurationError: If a setting is out of range.

    """

    owner: str = field(repr=False, compare=False)
    n_steps: int = 5
    num_samples: NumSamples = None
    baseline: Baseline = 0.0
    quadrature: Quadrature = "right"
    objective: Objective = TargetLogit()  # noqa: RUF009, which keeps no state
    interpolate_at: str | None = None
    batch_dim: int = 0
    task_is_named: bool = True

    def __post_init__(self) -> None:
        check_count(self.owner, "n_steps", self.n_steps, minimum=1, example=5)
        set_plain(self, "n_steps", int(self.n_steps))
        if self.num_samples is not None and self.num_samples != "all":
            check_count(self.owner, "num_samples", self.num_samples, minimum=1, example=12)
            set_plain(self, "num_samples", int(self.num_samples))
        set_plain(self, "baseline", check_baseline(self.owner, self.baseline))
        check_choice(self.owner, "quadrature", self.quadrature, QUADRATURES)
        check_objective(self.owner, self.objective)
        if self.interpolate_at is not None and not (isinstance(self.interpolate_at, str) and self.interpolate_at):
            raise ConfigurationError(
                f"{self.owner}(interpolate_at={describe(self.interpolate_at)}) was given.",
                "`interpolate_at` is the name of a module, or None for paths through the inputs.",
                'Pass, for example, interpolate_at="embedding".',
            )
        check_count(self.owner, "batch_dim", self.batch_dim, minimum=0, example=1)
        set_plain(self, "batch_dim", int(self.batch_dim))


def set_plain(settings: object, name: str, value: object) -> None:
    """Set a plain Python value: checkpoints and YAML files should hold no values of NumPy or OmegaConf."""
    object.__setattr__(settings, name, value)
