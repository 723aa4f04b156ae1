"""All that one phase 1 works on."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.attribution import Quadrature
from lightning_ydrop.importance.arrangement import Baseline, Tensors, arrange, start_points, take_rows
from lightning_ydrop.importance.objectives import Objective, check_pairs
from lightning_ydrop.importance.recording import borrowed
from lightning_ydrop.models.calls import Inputs, Target, read_rows
from lightning_ydrop.models.state import named_modules

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
        generator: On the CPU, the same on every rank and after a restart: the only source of chance for a measure.
        forward: Calls the model with rows of `inputs` and of `carried`.
        max_rows: At most so many rows should pass through the model at once: the training batch has as many.
        copied: Names of layers whose outputs in-place operations write over; `conductance` adds those that it finds.

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
    max_rows: int | None = None
    copied: set[str] = field(default_factory=set)

    @property
    def num_samples(self) -> int:
        """B_c."""
        return len((self.inputs or self.carried)[0])

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return (self.inputs or self.carried)[0].device

    def output(self, inputs: Tensors, carried: Tensors) -> Tensor:
        """Run the model on any number of rows.

        Returns:
            Its output, floating, shape (rows, *).

        Raises:
            ConfigurationError: If the output has no row for each row of the inputs.

        """
        return read_rows(self.forward(inputs, carried), rows=len((inputs or carried)[0]))

    def value(self, inputs: Tensors, carried: Tensors, target: Target) -> Tensor:
        """Give F of any number of rows: shape (rows,).

        Raises:
            ConfigurationError: If the objective gives something else.

        """
        output = self.output(inputs, carried)
        value: Any = self.objective(output, target)
        if not isinstance(value, Tensor) or value.shape != output.shape[:1]:
            raise ConfigurationError(
                f"{self.objective!r} gave {describe(value)} for {len(output)} rows.",
                "An objective gives one number for each row.",
                "Sum the values of each row, and of no two rows.",
            )
        return value

    def take(self, rows: Tensor) -> "Request":
        """Keep the samples of these row numbers alone."""
        shared = all(len(start) == 1 for start in self.starts)
        return replace(
            self,
            inputs=take_rows(self.inputs, rows),
            starts=self.starts if shared else take_rows(self.starts, rows),
            carried=take_rows(self.carried, rows),
            target=None if self.target is None else self.target.index_select(0, rows),
        )


def request_of(
    model: nn.Module,
    forward: Callable[..., Any],
    signature: inspect.Signature,
    layers: Mapping[str, nn.Module],
    unit_dims: Mapping[str, int],
    inputs: Inputs,
    target: Any,
    *,
    baseline: Baseline,
    interpolate_at: str | None,
    objective: Objective,
    n_steps: int,
    quadrature: Quadrature,
    generator: torch.Generator,
) -> Request:
    """Arrange a batch for phase 1.

    Where the path starts behind a module, `inputs` and `starts` are still empty: see `walk_from`.

    Raises:
        ConfigurationError: If inputs, target and baseline do not fit to each other or to the model.

    """
    call, walked, carried = arrange(forward, signature, inputs, baseline, walk=interpolate_at is None)
    phase1 = Request(
        model=model,
        layers=layers,
        unit_dims=unit_dims,
        inputs=walked,
        starts=start_points(walked, baseline) if interpolate_at is None else (),
        carried=carried,
        target=target if objective.takes_target else None,
        objective=objective,
        n_steps=n_steps,
        quadrature=quadrature,
        generator=generator,
        forward=call,
    )
    check_pairs(phase1.target, phase1.num_samples)
    return phase1


def settled(phase1: Request, interpolate_at: str | None, baseline: Baseline) -> Request:
    """Settle what needs the model to be run: where the path starts, and the target."""
    if interpolate_at is None and type(phase1.objective).settle is Objective.settle:
        return phase1  # nothing does, so leave the model alone
    with borrowed(phase1.model, phase1.device), torch.no_grad():
        if interpolate_at is not None:
            phase1 = _walk_from(phase1, interpolate_at, baseline)
        target = phase1.objective.settle(lambda: phase1.output(phase1.inputs, phase1.carried), phase1.target)
    return replace(phase1, target=target)


def find_module(owner: str, model: nn.Module, name: str) -> nn.Module:
    """Find the module behind which the path starts.

    Raises:
        ConfigurationError: If the model has no module of that name.

    """
    modules = named_modules(model)
    if name not in modules or not name:
        raise ConfigurationError(
            f"{owner}(interpolate_at={describe(name)}) was given.",
            f"`interpolate_at` names a module of {type(model).__name__}: "
            f"{', '.join(list(filter(None, modules))[:30])}.",
            "Pass the name of the embedding.",
        )
    return modules[name]


def _walk_from(phase1: Request, interpolate_at: str, baseline: Baseline) -> Request:
    """Let the path end at what a module puts out for the samples."""
    module = find_module("YDrop", phase1.model, interpolate_at)
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        phase1.forward((), phase1.carried)
    finally:
        handle.remove()
    if len(seen) != 1 or not _is_walkable(seen[0], phase1.num_samples):
        raise ConfigurationError(
            f"interpolate_at={interpolate_at!r} was given, and in one forward pass of {phase1.num_samples} samples "
            f"this module put out {describe(seen)}.",
            "The path starts at a module that is called once and puts out one floating tensor (B, *).",
            "Name the embedding, or a module of your own around what should be walked through.",
        )

    def forward(inputs: Tensors, carried: Tensors) -> Any:
        with _putting_out(module, inputs[0]):
            return phase1.forward((), carried)

    return replace(phase1, inputs=(seen[0],), starts=start_points((seen[0],), baseline), forward=forward)


def _is_walkable(output: Any, num_samples: int) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.shape[:1] == (num_samples,)


@contextmanager
def _putting_out(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Let a module put out what it is told."""
    handle = module.register_forward_hook(lambda module, args, ignored: output)
    try:
        yield
    finally:
        handle.remove()
