"""Y-Drop for any training loop: one step of phase 1, and the probabilities that follow from it."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.checks import check_module
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.attribution import Quadrature
from lightning_ydrop.functional.rates import Buckets, bucket_probabilities, draw_rates
from lightning_ydrop.importance.arrangement import is_empty
from lightning_ydrop.importance.baseline import Baseline
from lightning_ydrop.importance.counts import Count, count_nonfinite
from lightning_ydrop.importance.driving import check_driver, check_state, restore, states_of, take_over
from lightning_ydrop.importance.dry_run import dry_run
from lightning_ydrop.importance.findings import Findings, check_scored, warn_of_layers_left, without_samples
from lightning_ydrop.importance.interpolation import find_module
from lightning_ydrop.importance.measures import Conductance, Measure
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.importance.path import NumSamples, PathSettings
from lightning_ydrop.importance.ranks import agree_on_units, averages, world_size
from lightning_ydrop.importance.scoring import scored
from lightning_ydrop.importance.selection import check_widths, driven_layers
from lightning_ydrop.importance.settings import EngineSettings
from lightning_ydrop.importance.tasks import Task, objective_of
from lightning_ydrop.layers.conductance_dropout import activate_layers, update_layers
from lightning_ydrop.models.calls import Inputs, Target
from lightning_ydrop.models.modules import device_of
from lightning_ydrop.models.sharing import without_lost_memory
from lightning_ydrop.models.wrappers import unwrapped


class YDrop:
    """Drive the `ConductanceDropout` layers of a model: drop the most important units more often.

    Call `step` with the batch before each training step on it (Fig. 1, arXiv 2409.09088): phase 1 scores the units of
    every layer on some samples of the batch, in one forward and one backward pass; the units with the highest scores
    get the high rate, the others the low one, and phase 2 is the training step itself. Phase 1 changes nothing but
    these probabilities: parameters, gradients, buffers and the attributes beside them, metrics, training flags and
    random streams stay as they are, in every module that a call runs. What a forward changes elsewhere, such as a
    global variable, can't be seen: phase 1 calls it in evaluation mode, with other rows than training does.

    It has `n_steps * num_samples + 1` rows where one start serves all samples: as long as `quadrature` is "right",
    `baseline` is the same for all samples, and nothing is carried along the path beside the floating inputs. Otherwise
    each sample has a start of its own, and there are `(n_steps + 1) * num_samples` rows. Where these are more than the
    rows of the batch, they pass through the model in several parts, none of which has more rows than training has.

    Where torch.distributed is at work, scores are averaged over all ranks: all of them hold the same probabilities,
    draw samples and masks of their own, and have to call `step` alike.

    Args:
        model: A model with `ConductanceDropout` layers. Wrappers of DDP and of Fabric are looked through.
        elasticity: `alpha` of the running mean (Eq. 6), in [0, 1]: 0 keeps `initial_drop_prob`, 1 follows each step.
        buckets: Rates and sizes of the two buckets (Eq. 5 and 8). None takes `Buckets.around(p)` for each layer.
        initial_drop_prob: `p_0`, where the running mean starts, in [0, 1). None takes the paper's 0.35, around p too.
        n_steps: `n_c`, steps on the path from the baseline to each sample, at least 1.
        num_samples: `B_c`, samples drawn from the batch (Eq. 9), at least 1, or "all". None takes as many as the batch
            of B has rows for: `max(1, (B - 1) // n_steps)`, which is 12 for 64 and 6 for 32, or
            `max(1, B // (n_steps + 1))` where each sample has a start of its own.
        baseline: Where the paths start, in the model's input space: a number, a tensor of the shape of one sample, or a
            list of one for each floating input, None for one that stays as it is.
        quadrature: Where on each step the gradient is taken: "right" (Eq. 2), "left" (Captum), or "trapezoid".
        measure: What makes a unit important.
        objective: F, what is differentiated: the name of a task ("multiclass", "binary", "multilabel", "regression" or
            "reconstruction"), or an objective. By default the logit of the labelled class, as for "multiclass", but a
            first batch is refused that looks like another task.
        interpolate_at: Name of a module, such as an embedding, at whose output the paths end instead of at the inputs.
        forward: What is called instead of `model`, in the way in which `forward` of a model is called.
        seed: Of the samples drawn and the rates, which depend on it, the number of steps taken and the rank alone.
        every_n_batches: Phase 1 runs in every nth `step`, at least 1; its probabilities serve until the next, and their
            running mean moves as far as in n updates.
        batch_dim: The dimension of the samples in inputs, target, output and layers: 1 for models of (T, B, F), such as
            `nn.LSTM` and `nn.Transformer` by default. A tensor of them that has its samples first may have them there.
        compile_phase1: Whether the dry run compiles phase 1, for batches of its shape: see `YDropCallback`.

    Attributes:
        layers: The layers driven, by name.
        scores: The score of every layer by name, which its units are ranked by: float32, shape (U,), on the device of
            its activations. All 0 where nothing was measured, as on samples whose labels do not count.
        findings: What a dry run has found out, once one has had samples to look at.

    Raises:
        ConfigurationError: If an argument is out of range, or the model has no `ConductanceDropout`.

    Example:
        >>> from lightning_ydrop import ConductanceDropout
        >>> model = nn.Sequential(nn.Linear(4, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 2))
        >>> ydrop = YDrop(model)
        >>> ydrop.step(torch.rand(16, 4), torch.zeros(16, dtype=torch.long))
        >>> ydrop.scores["1"].shape
        torch.Size([8])

    """

    def __init__(
        self,
        model: nn.Module,
        *,
        elasticity: float = 1e-2,
        buckets: Buckets | None = None,
        initial_drop_prob: float | None = None,
        n_steps: int = 5,
        num_samples: NumSamples = None,
        baseline: Baseline = 0.0,
        quadrature: Quadrature = "right",
        measure: Measure = Conductance(),
        objective: Objective | Task | None = None,
        interpolate_at: str | None = None,
        forward: Callable[..., Any] | None = None,
        seed: int = 0,
        every_n_batches: int = 1,
        batch_dim: int = 0,
        compile_phase1: bool = False,
    ) -> None:
        owner = type(self).__name__
        aim, named = objective_of(owner, objective), objective is not None
        path = PathSettings(owner, n_steps, num_samples, baseline, quadrature, aim, interpolate_at, batch_dim, named)
        rates = elasticity, buckets, initial_drop_prob
        self._set_up(model, forward, EngineSettings(path, *rates, measure, seed, every_n_batches, compile_phase1))

    @classmethod
    def from_settings(
        cls, model: nn.Module, settings: EngineSettings, forward: Callable[..., Any] | None = None
    ) -> "YDrop":
        """Make an engine from settings that were checked before."""
        engine = cls.__new__(cls)
        engine._set_up(model, forward, settings)
        return engine

    def _set_up(self, model: nn.Module, forward: Callable[..., Any] | None, settings: EngineSettings) -> None:
        owner, path = settings.path.owner, settings.path
        check_module(owner, model)
        if forward is not None and not callable(forward):
            raise ConfigurationError(
                f"{owner}(forward={describe(forward)}) was given.",
                "`forward` is called instead of the model.",
                "Pass, for example, forward=model.predict.",
            )
        self.settings = settings
        self.model, self.forward = unwrapped(model, forward)
        self.layers = driven_layers(self.model)
        if path.interpolate_at is not None:
            find_module(type(self).__name__, self.model, path.interpolate_at)
        self.take_over()
        self.reset()

    def take_over(self) -> None:
        """Drive the layers from now on, where another engine has been made for them since."""
        self._number = take_over(self.layers)

    def reset(self) -> None:
        """Forget all steps: the engine and its layers are as they were made."""
        for layer in self.layers.values():
            layer.reset()
        self.scores: dict[str, Tensor] = {}
        self._nonfinite = Count(count_nonfinite)
        self._unusable = Count(self.count_unusable)
        self._steps_taken = 0
        self._progress = 1.0
        self.findings: Findings | None = None

    @property
    def is_due(self) -> bool:
        """Whether the next step runs phase 1."""
        return self._steps_taken % self.settings.every_n_batches == 0 or not self.scores

    @property
    def nonfinite(self) -> Tensor:
        """How often a layer's scores were not finite and its probabilities stayed: int64, on the training device."""
        return self._nonfinite.total

    @property
    def unusable(self) -> Tensor:
        """How many entries of the targets drawn named nothing in the output and did not count: likewise."""
        return self._unusable.total

    @property
    def unguarded(self) -> list[str]:
        """What phase 1 was found to change after the dry run, where that may not have been undone the first time."""
        observations = None if self.findings is None else self.findings.subject.observations
        return [] if observations is None else observations.unguarded

    @property
    def active(self) -> bool:
        """Whether any layer is driven."""
        return any(layer.active for layer in self.layers.values())

    def step(self, inputs: Inputs, target: Target = None, *, progress: float = 1.0) -> None:
        """Run phase 1 on a batch, where it is due, update the layers' probabilities and make them active.

        The first step makes a dry run before. A layer that the forward pass does not call keeps its probabilities, and
        so does one whose scores are not all finite or all 0, and so do all of them in a batch without samples.

        Args:
            inputs: What forward takes, on the model's device: a tensor (B, *), a tuple of arguments, or a mapping of
                arguments by name. Paths run through floating tensors, all others are carried along.
            target: Class index (B,), soft labels (B, C), dense labels (B, H, W), or None for the sum of the outputs.
            progress: How far to go from vanilla dropout, at 0, to the probabilities, at 1.

        Raises:
            ConfigurationError: If inputs or target do not fit to the model, or another engine drives the layers.

        """
        check_driver(self.settings.path.owner, self.layers, self._number)
        if self.findings is None:
            self.dry_run(inputs, target)
        scores = self._score(inputs, target) if self.findings is not None and self.is_due else {}
        if self.findings is None or not self.is_due or (not scores and world_size() == 1):
            self.skip(progress=progress)
            return
        check_widths(scores, num_units := self.findings.plan.num_units)
        generator = self._generator("rates")
        buckets = [self.settings.buckets_of(layer.p) for layer in self.layers.values()]
        low, high = (
            dict(zip(self.layers, draw_rates(rates, generator), strict=True))
            for rates in ([each.low for each in buckets], [each.high for each in buckets])
        )
        self._steps_taken, self._progress = self._steps_taken + 1, progress
        for names, means in averages(scores, num_units, self.findings.device):
            self._update(names, means, low, high)

    def skip(self, *, progress: float = 1.0) -> None:
        """Take a step without phase 1, as `step` does where it is not due: probabilities stay what they are.

        Args:
            progress: As for `step`.

        """
        if self.scores and (progress != self._progress or not self.active):
            activate_layers([self.layers[name] for name in self.scores], progress)
        self._steps_taken, self._progress = self._steps_taken + 1, progress

    def dry_run(self, inputs: Inputs, target: Target = None) -> None:
        """Run phase 1 on a batch, check everything on the way, and throw the scores away.

        It looks at values, so that a device has to catch up once. What one rank finds wrong is raised on all of them.
        Where no rank has a sample there is nothing to check, and another batch has to be taken.

        Args:
            inputs: As for `step`.
            target: As for `step`.

        Raises:
            ConfigurationError: If inputs, target or measure do not fit to the model.

        """
        settings, raised, is_nothing = self.settings, None, False
        findings = without_samples(self.model, self.forward, self.layers, settings.path)
        try:
            is_nothing = is_empty(inputs, settings.path.batch_dim)
            if not is_nothing:
                subject = (self.model, self.forward, self.layers)
                findings = without_lost_memory(partial(dry_run, *subject, settings, inputs, target, self._generator))
        except Exception as error:
            # Raised once the others know: left alone, they would wait for this rank for ever.
            raised = error
        num_units = agree_on_units(findings.plan.num_units, raised, is_nothing)
        if num_units is None:
            return
        check_scored(self.model, self.layers, findings, num_units)
        warn_of_layers_left(findings, self.layers, num_units)
        in_order = {name: num_units[name] for name in self.layers if name in num_units}
        self.findings = replace(findings, plan=replace(findings.plan, num_units=in_order))
        for count in (self._nonfinite, self._unusable):
            count.total = count.total.to(findings.device)

    def count_unusable(self, labels: Tensor) -> Tensor | None:
        """Count, after a dry run, the labels that name nothing in the output: None where the objective has none."""
        assert self.findings is not None
        return self.findings.subject.objective.count_unusable(self.findings.plan.output, labels)

    def deactivate(self) -> None:
        """Return every layer to vanilla dropout. Running means are kept for the next step."""
        for layer in self.layers.values():
            layer.deactivate()

    def state_dict(self) -> dict[str, Any]:
        """Hold all that resuming needs: tensors, numbers and dictionaries alone."""
        return {
            "steps_taken": self._steps_taken,
            "nonfinite": self.nonfinite.clone(),
            "unusable": self.unusable.clone(),
            "progress": self._progress,
            "scores": {name: scores.clone() for name, scores in self.scores.items()},
            "layers": states_of(self.layers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken.

        Raises:
            ConfigurationError: If the state is that of other layers, or none.

        """
        check_state(state, self.state_dict())
        device = device_of(self.model)
        self._steps_taken = state["steps_taken"]
        self._nonfinite.total = state["nonfinite"].to(device, copy=True)
        self._unusable.total = state["unusable"].to(device, copy=True)
        self._progress = state["progress"]
        self.scores = {name: scores.to(device, copy=True) for name, scores in state["scores"].items()}
        restore(self.layers, state["layers"], self._progress, device)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the dry run has found: a copy holds other tensors, and makes a dry run of its own."""
        self.unusable  # noqa: B018, which counts what waits for that
        return vars(self) | {"findings": None}

    def _score(self, inputs: Inputs, target: Target) -> dict[str, Tensor]:
        """Draw samples of the batch and measure them: nothing, where it has too few."""
        findings = self.findings
        if findings is None or is_empty(inputs, findings.path.batch_dim):
            return {}
        self.findings, request, scores = scored(findings, self.settings.measure, inputs, target, self._generator)
        target = None if request is None else request.target
        if findings.plan.counts_unusable and target is not None and not target.is_floating_point():
            self._unusable.add(target)
        return scores

    def _update(self, names: list[str], scores: Tensor, low: Mapping[str, float], high: Mapping[str, float]) -> None:
        """Rank the units of layers of one width by their scores (L, U), and give them this step's rates."""
        # Not isfinite().all(1), which is five operations.
        largest = torch.linalg.vector_norm(scores, math.inf, dim=1, keepdim=True)
        self._nonfinite.add(largest)
        ranks_units = largest / largest == 1  # neither 0 nor infinite nor NaN
        self.scores.update(zip(names, scores.unbind(), strict=True))
        moves = (1.0, self.settings.elasticity_of_an_update)  # of the probabilities and of the running means
        rows = [[[rate[name]] for name in names] for rate in (low, high)] + [[[each]] * len(names) for each in moves]
        # On the CPU, whatever the default device is: made elsewhere, it would be copied there while the host waits.
        numbers = torch.tensor(rows, dtype=torch.float32, device="cpu").to(scores.device, non_blocking=True)
        low_here, high_here, *_ = numbers
        update_layers(
            [self.layers[name] for name in names],
            bucket_probabilities(scores, low_here, high_here, self.settings.buckets_of(0.5).strong_fraction),
            weights=numbers[2:] * ranks_units,
            initial_drop_prob=[self.settings.initial_drop_prob_of(self.layers[name].p) for name in names],
            progress=self._progress,
        )

    def _generator(self, purpose: str) -> torch.Generator:
        """Make a source of chance that depends on the seed, the step and the purpose alone: nothing to save or lose."""
        # Hashed, since torch's CPU generator looks at no more than 32 bits of a seed.
        digest = hashlib.blake2b(f"{self.settings.seed} {self._steps_taken} {purpose}".encode(), digest_size=4).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
