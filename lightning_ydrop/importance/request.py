"""All that one phase 1 works on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.attribution import Quadrature
from lightning_ydrop.importance.arrangement import Batch, Role, arrange, device_of_samples
from lightning_ydrop.importance.baseline import Tensors, start_points
from lightning_ydrop.importance.interpolation import outputs_of, putting_out
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.ranks import rank
from lightning_ydrop.importance.recording import borrowed, recording
from lightning_ydrop.importance.subject import Plan, Subject
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.calls import Inputs, Target, read_rows
from lightning_ydrop.models.checkpointing import checkpoint_outputs
from lightning_ydrop.models.observations import Observations
from lightning_ydrop.models.relus import keep_inputs

Forward = Callable[[Tensors, Tensors], Any]


@dataclass(frozen=True)
class Request:
    """All that a measure may use to score the units in one phase 1.

    Attributes:
        model: The model. It is called by `output` and `value`, never directly.
        layers: The layers to score, by name.
        unit_dims: For each of them the dimension of the units in its output.
        inputs: The samples drawn from the batch, where their paths end: floating tensors, each (B_c, *).
        starts: For each input the baseline, (1, *), or (B_c, *) where the samples do not share one.
        carried: Whatever else has a row for each sample and stays as it is along the path: tokens, masks; (B_c, *).
        target: What F is taken with: class index (B_c,), soft labels (B_c, C), dense labels (B_c, *), or None.
        objective: F, from the model's output and the target.
        n_steps: Steps on the path from the baseline to each sample.
        quadrature: Where on each step the gradient is taken.
        generator: The only random numbers that a measure may use. On the CPU, the same on every rank and after a
            restart.
        forward: Calls the model with rows of `inputs` and of `carried`, both with the batch first.
        batch_dim: The dimension of the rows in outputs, of the model and of layers.
        max_rows: At most so many rows should pass through the model at once: the training batch has as many.
        plan: What the dry run has decided.
        guarded: What a call runs or may change.
        observations: What passes were seen to change; None guards everything.
        learning: Whether the passes of this request are observed.

    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    unit_dims: Mapping[str, int]
    inputs: Tensors
    starts: Tensors
    carried: Tensors
    target: Target
    objective: Objective
    n_steps: int
    quadrature: Quadrature
    generator: torch.Generator
    forward: Forward
    batch_dim: int = 0
    max_rows: int | None = None
    plan: Plan = Plan()  # noqa: RUF009, which is frozen
    guarded: tuple[object, ...] = ()
    observations: Observations | None = None
    learning: bool = False

    @property
    def num_samples(self) -> int:
        """B_c."""
        return len((self.inputs or self.carried)[0])

    @property
    def device(self) -> torch.device:
        """Where the model works on the samples."""
        return device_of_samples(self.inputs, self.carried)

    def dim_of_rows(self, name: str) -> int:
        """Say where the rows are in what a layer puts out, or for the empty name in what the model does."""
        if name in self.plan.rows_first:
            return 0
        layer = self.layers.get(name)
        return (layer.batch_dim if isinstance(layer, ConductanceDropout) else 0) or self.batch_dim

    @contextmanager
    def borrowed(self, *, constant_parameters: bool = False, evaluate: bool = True) -> Iterator[None]:
        """Put all that a call runs in the state in which units are measured, and undo that at the end: see `borrowed`.

        Args:
            constant_parameters: Whether gradients with respect to parameters are left out, where the model's forward
                can do without.
            evaluate: Whether to put modules in evaluation mode.

        """
        with borrowed(
            self.model,
            self.device,
            constant_parameters=constant_parameters and self.plan.constant_parameters,
            beside=self.guarded,
            observations=self.observations,
            learning=self.learning,
            evaluate=evaluate,
        ):
            keep_inputs(self.plan.relus)
            checkpoint_outputs(self.plan.checkpointed)
            yield

    def output(self, inputs: Tensors, carried: Tensors) -> Tensor:
        """Run the model on any number of rows.

        A single row goes in twice, since models that squeeze their outputs would lose its dimension.

        Returns:
            Its output, floating, shape (rows, *).

        Raises:
            ConfigurationError: If the output has no row for each row of the inputs.

        """
        rows = len((inputs or carried)[0])
        if rows == 1:
            inputs, carried = (tuple(torch.cat([each, each]) for each in rows_of) for rows_of in (inputs, carried))
            return read_rows(self.forward(inputs, carried), 2, self.dim_of_rows(""))[:1]
        return read_rows(self.forward(inputs, carried), rows, self.dim_of_rows(""))

    def value(self, inputs: Tensors, carried: Tensors, target: Target) -> Tensor:
        """Give F of any number of rows: shape (rows,).

        Raises:
            ConfigurationError: If the objective gives something else.

        """
        return self.value_of(self.output(inputs, carried), target)

    def value_of(self, output: Tensor, target: Target) -> Tensor:
        """Give F of the model's output for any number of rows, (rows, *): shape (rows,).

        Raises:
            ConfigurationError: If the objective gives something else.

        """
        try:
            value: Any = self.objective(output, target)
        except ConfigurationError:
            raise
        except Exception as error:
            error.add_note(
                f"lightning_ydrop called {self.objective!r} with the output {describe(output)} and the target "
                f"{describe(target)} for rows of a path. Let it take any number of rows, and give one number for each, "
                "or choose another objective=...."
            )
            raise
        if not isinstance(value, Tensor) or value.shape != output.shape[:1]:
            raise ConfigurationError(
                f"{self.objective!r} gave {describe(value)} for {len(output)} rows.",
                "An objective gives one number for each row.",
                "Sum the values of each row, and of no two rows.",
            )
        return value

    def part(self, first: int, end: int) -> "Request":
        """Keep only some consecutive samples."""
        shared = all(len(start) == 1 for start in self.starts)
        return replace(
            self,
            inputs=tuple(each[first:end] for each in self.inputs),
            starts=self.starts if shared else tuple(each[first:end] for each in self.starts),
            carried=tuple(each[first:end] for each in self.carried),
            target=None if self.target is None else self.target[first:end],
        )


def bare_request(
    subject: Subject,
    batch: Batch,
    path: PathSettings,
    generator: torch.Generator,
    *,
    plan: Plan = Plan(),
    max_rows: int | None = None,
    learning: bool = False,
) -> Request:
    """Make a request without running the model: paths that run through the outputs of a module have no ends yet.

    Args:
        subject: The model.
        batch: The samples.
        path: How they are measured.
        generator: The measure's random numbers.
        plan: What the dry run has decided.
        max_rows: At most so many rows should pass through the model at once.
        learning: Whether passes are observed.

    """
    return Request(
        model=subject.model,
        layers=subject.layers,
        unit_dims=subject.unit_dims,
        inputs=batch.inputs,
        starts=batch.starts,
        carried=batch.carried,
        target=batch.target,
        objective=subject.objective,
        n_steps=path.n_steps,
        quadrature=path.quadrature,
        generator=generator,
        forward=batch.call,
        batch_dim=path.batch_dim,
        max_rows=max_rows,
        plan=plan,
        guarded=(*subject.guarded, *batch.call.others),
        observations=subject.observations,
        learning=learning,
    )


def completed(request: Request, batch: Batch, path: PathSettings) -> Request:
    """Complete a request of `bare_request`: the model is run where the paths' ends or the target depend on it.

    Args:
        request: The bare request.
        batch: The samples that it was made of.
        path: How they are measured.

    Raises:
        ConfigurationError: If the module to interpolate at puts out no rows.

    """
    if path.interpolate_at is None and type(request.objective).settle is Objective.settle:
        return request
    # Not torch.no_grad(): a forward may take gradients itself, also with respect to what phase 1 records.
    with request.borrowed(constant_parameters=True), recording(request.layers, request.plan.overwritten):
        if path.interpolate_at is not None:
            request = _interpolated(request, batch, path)
        target = request.objective.settle(
            lambda: request.output(request.inputs, request.carried).detach(), request.target
        )
    return replace(request, target=target)


def arranged(
    subject: Subject, path: PathSettings, inputs: Inputs, target: Target, roles: tuple[Role, ...] | None = None
) -> Batch:
    """Arrange a whole batch: see `arrange`.

    Raises:
        ConfigurationError: If inputs and target do not fit to each other or to the model.

    """
    batch = arrange(
        subject.forward,
        subject.signature,
        inputs,
        target if subject.objective.takes_target else None,
        baseline=path.baseline,
        interpolate=path.interpolate_at is None,
        batch_dim=path.batch_dim,
        roles=roles,
        model=subject.model,
    )
    return batch.aimed_by(subject.objective)


def num_samples_of(path: PathSettings, batch: Batch) -> int:
    """Say how many samples of a batch are measured."""
    if path.num_samples == "all":
        return batch.size
    if path.num_samples is not None:
        return min(path.num_samples, batch.size)
    # As many as there are rows for, where the start takes one row or one for each sample.
    if _has_one_start(path, batch):
        return max(1, (batch.size - 1) // path.n_steps)
    return max(1, batch.size // (path.n_steps + 1))


def num_rows_of(path: PathSettings, batch: Batch) -> int:
    """Say how many rows phase 1 passes through the model for a batch."""
    num_samples = num_samples_of(path, batch)
    if _has_one_start(path, batch):
        return path.n_steps * num_samples + 1
    return (path.n_steps + 1) * num_samples


def _has_one_start(path: PathSettings, batch: Batch) -> bool:
    return path.quadrature == "right" and batch.shares_start


def request_from(
    subject: Subject,
    path: PathSettings,
    plan: Plan,
    inputs: Inputs,
    target: Target,
    generator_for: Callable[[str], torch.Generator],
    *,
    learning: bool = False,
) -> Request | None:
    """Draw samples of a batch and make a request of them, or nothing where the batch is too small.

    Args:
        subject: The model.
        path: How samples are measured.
        plan: What the dry run has decided.
        inputs: What forward takes.
        target: What F is taken with.
        generator_for: Gives the random numbers for a purpose.
        learning: Whether passes are observed.

    Raises:
        ConfigurationError: If inputs and target do not fit each other or the model.

    """
    batch = arranged(subject, path, inputs, target, plan.roles)
    size, n_steps = batch.size, path.n_steps
    if size < plan.smallest_batch:
        return None
    num_samples = num_samples_of(path, batch)
    if num_samples < size:
        generator = generator_for(f"samples of rank {rank()}")
        batch = batch.take(torch.randperm(size, generator=generator, device="cpu")[:num_samples])
    # More rows at once than in training would need more memory. Only if a single path has more, it can't be helped.
    max_rows = max(size, n_steps + 1)
    if plan.memory < 1:
        max_rows = max(2, int(max_rows * plan.memory))
    generator = generator_for("measure")
    request = bare_request(subject, batch, path, generator, plan=plan, max_rows=max_rows, learning=learning)
    return completed(request, batch, path)


def _interpolated(request: Request, batch: Batch, path: PathSettings) -> Request:
    """Let the paths run through what a module puts out for the samples."""
    assert path.interpolate_at is not None
    module, output = outputs_of(request.model, path.interpolate_at, batch, path.batch_dim)

    def forward(inputs: Tensors, carried: Tensors) -> Any:
        with putting_out(module, inputs[0].movedim(0, path.batch_dim) if path.batch_dim else inputs[0]):
            return batch.call((), carried)

    starts = start_points((output,), path.baseline, path.batch_dim)
    return replace(request, inputs=(output,), starts=starts, forward=forward)
