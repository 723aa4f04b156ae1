"""Y-Drop for any training loop: one step of phase 1, and the probabilities that follow from it."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ydrop.checks import check_choice, check_count, check_fraction, check_module, check_rate
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe
from lightning_ydrop.functional.attribution import QUADRATURES, Quadrature
from lightning_ydrop.functional.rates import Buckets, bucket_probabilities, draw_rates
from lightning_ydrop.importance.arrangement import Baseline, check_baseline, is_empty
from lightning_ydrop.importance.attribution import count_units
from lightning_ydrop.importance.measures import Conductance, Measure, check_measure
from lightning_ydrop.importance.objectives import Objective, TargetLogit, check_objective
from lightning_ydrop.importance.ranks import add_over_ranks, gather_over_ranks, rank, world_size
from lightning_ydrop.importance.recording import borrowed, recording
from lightning_ydrop.importance.request import Request, find_module, request_of, settled
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.conductance_dropout import activate_layers, update_layers
from lightning_ydrop.layers.kinds import dropout_like_modules
from lightning_ydrop.models.calls import Inputs, Target, signature_of
from lightning_ydrop.models.state import device_of, named_modules

NumSamples = int | Literal["all"] | None

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class YDrop:
    """Drive the `ConductanceDropout` layers of a model: drop the most important units more often.

    Call `step` with the batch before each training step on it (Fig. 1, arXiv 2409.09088): phase 1 scores the units of
    every layer on some samples of the batch, in one forward and one backward pass; the units with the highest scores
    get the high rate, the others the low one, and phase 2 is the training step itself. Phase 1 changes nothing but
    these probabilities: parameters, gradients, BatchNorm statistics and other buffers, metrics, training flags and
    torch's random stream stay as they are. What a forward of the user's keeps elsewhere is its own affair: phase 1
    calls it in evaluation mode, with other rows than training does.

    It has `n_steps * num_samples + 1` rows where one start serves all samples: as long as `quadrature` is "right",
    `baseline` is the same for all samples, and nothing is carried along the path beside the floating inputs. Otherwise
    each sample has a start of its own, and there are `(n_steps + 1) * num_samples` rows. Where these are more than the
    rows of the batch, they pass through the model in several parts, none of which has more rows than training has.

    Where torch.distributed is at work, scores are averaged over all ranks: all of them hold the same probabilities,
    draw samples and masks of their own, and have to call `step` alike.

    Args:
        model: A model with `ConductanceDropout` layers; not its DDP wrapper.
        elasticity: `alpha` of the running mean (Eq. 6), in [0, 1]: 0 keeps `initial_drop_prob`, 1 follows each step.
        buckets: The two buckets' rates and sizes (Eq. 5 and 8).
        initial_drop_prob: `p_0`, where the running mean starts, in [0, 1).
        n_steps: `n_c`, steps on the path from the baseline to each sample, at least 1.
        num_samples: `B_c`, samples drawn from the batch (Eq. 9), at least 1, or "all". None takes as many as the batch
            of B has rows for: `max(1, (B - 1) // n_steps)`, which is 12 for 64 and 6 for 32, or
            `max(1, B // (n_steps + 1))` where each sample has a start of its own.
        baseline: Where the paths start, in the model's input space: a number, a tensor of the shape of one sample, or a
            list of one for each floating input, None for one that stays as it is.
        quadrature: Where on each step the gradient is taken: "right" (Eq. 2), "left" (Captum), or "trapezoid".
        measure: What makes a unit important.
        objective: F, what is differentiated.
        interpolate_at: Name of a module, such as an embedding, at whose output the paths end instead of at the inputs.
        forward: What is called instead of `model`, in the way in which `forward` of a model is called.
        seed: Of the samples drawn and the rates, which depend on it, the number of steps taken and the rank alone.
        every_n_batches: Phase 1 runs in every so-manyth `step`, at least 1; its probabilities serve until the next, and
            their running mean moves as far as in so many updates.

    Attributes:
        layers: The layers driven, by name.
        scores: The score of every layer by name, which its units are ranked by: float32, shape (U,), on the device of
            its activations. All 0 where nothing was measured, as on samples whose labels do not count.
        nonfinite: How often a layer's scores were not finite and its probabilities stayed what they were: one whole
            number in a tensor on the training device.

    Raises:
        ConfigurationError: If an argument is out of range, or the model has no `ConductanceDropout`.

    Example:
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
        elasticity: float = 1e-3,
        buckets: Buckets = Buckets(),
        initial_drop_prob: float = 0.35,
        n_steps: int = 5,
        num_samples: NumSamples = None,
        baseline: Baseline = 0.0,
        quadrature: Quadrature = "right",
        measure: Measure = Conductance(),
        objective: Objective = TargetLogit(),
        interpolate_at: str | None = None,
        forward: Callable[..., Any] | None = None,
        seed: int = 0,
        every_n_batches: int = 1,
    ) -> None:
        check_settings(
            type(self).__name__,
            elasticity=elasticity,
            buckets=buckets,
            initial_drop_prob=initial_drop_prob,
            n_steps=n_steps,
            num_samples=num_samples,
            baseline=baseline,
            quadrature=quadrature,
            measure=measure,
            objective=objective,
            interpolate_at=interpolate_at,
            seed=seed,
            every_n_batches=every_n_batches,
        )
        check_module(type(self).__name__, model)
        if forward is not None and not callable(forward):
            raise ConfigurationError(
                f"{type(self).__name__}(forward={describe(forward)}) was given.",
                "`forward` is called instead of the model.",
                "Pass, for example, forward=model.predict.",
            )
        self.model = model
        self.elasticity = elasticity
        self.buckets = buckets
        self.initial_drop_prob = initial_drop_prob
        self.n_steps = n_steps
        self.num_samples = num_samples
        self.baseline = baseline
        self.quadrature: Quadrature = quadrature
        self.measure = measure
        self.objective = objective
        self.interpolate_at = interpolate_at
        self.forward = model if forward is None else forward
        self.seed = seed
        self.every_n_batches = every_n_batches
        # One update stands for so many towards the same rates, so that elasticity means the same whatever n is.
        self._elasticity_of_an_update = elasticity if every_n_batches == 1 else 1 - (1 - elasticity) ** every_n_batches
        self.layers = driven_layers(model)
        self._unit_dims = {name: layer.unit_dim for name, layer in self.layers.items()}
        if interpolate_at is not None:
            find_module(type(self).__name__, model, interpolate_at)
        # Layers whose outputs in-place operations of the network write over.
        self._copied: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget all steps: the engine and its layers are as they were made."""
        for layer in self.layers.values():
            layer.reset()
        self.scores: dict[str, Tensor] = {}
        self.nonfinite = torch.zeros((), dtype=torch.int64)
        self._steps_taken = 0
        self._progress = 1.0
        self._num_units: dict[str, int] = {}

    @property
    def is_dry_run_done(self) -> bool:
        """Whether a rehearsal has had samples to look at."""
        return bool(self._num_units)

    @property
    def is_due(self) -> bool:
        """Whether the next step runs phase 1."""
        return self._steps_taken % self.every_n_batches == 0 or not self.scores

    @property
    def active(self) -> bool:
        """Whether any layer is driven."""
        return any(layer.active for layer in self.layers.values())

    def step(self, inputs: Inputs, target: Target = None, *, progress: float = 1.0) -> None:
        """Run phase 1 on a batch, where it is due, update the layers' probabilities and make them active.

        The first step rehearses first. A layer that the forward pass does not call keeps its probabilities, and so does
        one whose scores are not all finite or all 0, and so do all of them in a batch without samples.

        Args:
            inputs: What forward takes, on the model's device: a tensor (B, *), a tuple of arguments, or a mapping of
                arguments by name. Floating tensors are walked to from the baseline, all others carried along.
            target: Class index (B,), soft labels (B, C), dense labels (B, H, W), or None for the sum of the outputs.
            progress: How far to go from vanilla dropout, at 0, to the probabilities, at 1.

        Raises:
            ConfigurationError: If inputs or target do not fit to the model.

        """
        if not self.is_dry_run_done:
            self.dry_run(inputs, target)
        nothing = is_empty(inputs)
        if not self.is_dry_run_done or not self.is_due or (nothing and world_size() == 1):
            self.skip(progress=progress)
            return
        generator = self._generator("rates")
        low, high = (
            dict(zip(self.layers, draw_rates(rate, len(self.layers), generator), strict=True))
            for rate in (self.buckets.low, self.buckets.high)
        )
        new = {} if nothing else self._score(inputs, target)
        self._check_widths(new)
        self._steps_taken += 1
        self._progress = progress
        for members, scores in self._averages(new):
            # Not isfinite().all(1), which is five operations.
            largest = torch.linalg.vector_norm(scores, math.inf, dim=1, keepdim=True)
            finite = largest < math.inf
            self.nonfinite += (~finite).sum().to(self.nonfinite.device)
            self.scores.update(zip(members, scores.unbind(), strict=True))
            rates = torch.tensor([[[rate[name]] for name in members] for rate in (low, high)], dtype=torch.float32)
            low_here, high_here = rates.to(scores.device, non_blocking=True)
            update_layers(
                [self.layers[name] for name in members],
                bucket_probabilities(scores, low_here, high_here, self.buckets.strong_fraction),
                elasticity=self._elasticity_of_an_update,
                initial_drop_prob=self.initial_drop_prob,
                progress=progress,
                accept=finite & (largest > 0),  # zeros rank nothing
            )

    def skip(self, *, progress: float = 1.0) -> None:
        """Take a step without phase 1, as `step` does where it is not due: probabilities stay what they are.

        Args:
            progress: As for `step`.

        """
        if self.scores and (progress != self._progress or not self.active):
            activate_layers([self.layers[name] for name in self.scores], progress)
        self._steps_taken += 1
        self._progress = progress

    def dry_run(self, inputs: Inputs, target: Target = None) -> None:
        """Run phase 1 on a batch, check everything on the way, and throw the scores away.

        It looks at values, so that a device has to catch up once. What one rank finds wrong is raised on all of them.
        Where no rank has a sample there is nothing to check, and another batch has to be rehearsed on.

        Args:
            inputs: As for `step`.
            target: As for `step`.

        Raises:
            ConfigurationError: If inputs, target or measure do not fit to the model.

        """
        # Kept, since finding it takes longer than a small network's forward pass.
        self._signature = signature_of(self.model, self.forward)
        raised: Exception | None = None
        num_units: dict[str, int] = {}
        nothing = is_empty(inputs)
        try:
            if nothing:
                self.nonfinite = self.nonfinite.to(device_of(self.model))
            else:
                num_units = self._check(inputs, target)
        except Exception as error:
            # Raised once the others know: left alone, they would wait for this rank for ever.
            raised = error
        reports = gather_over_ranks((num_units, str(raised or ""), nothing))
        if raised is not None:
            raise raised
        if all(empty for _, _, empty in reports):
            return
        for other, (theirs, message, _) in enumerate(reports):
            if message or any(num_units.get(name, size) != size for name, size in theirs.items()):
                raise ConfigurationError(
                    f"Rank {other} cannot run phase 1: {message or theirs}",
                    "All ranks run phase 1 alike, on layers of the same width.",
                    "Mend what is wrong on that rank.",
                )
            num_units |= theirs
        if not num_units:
            raise ConfigurationError(
                f"Phase 1 of {type(self.model).__name__} scores none of {', '.join(map(repr, self.layers))}.",
                "Y-Drop drives layers that forward calls.",
                "Call them in forward, or write `ydrop_forward` in the LightningModule.",
            )
        if missed := [name for name in self.layers if name not in num_units]:
            warnings.warn(
                f"Y-Drop has no score for {', '.join(map(repr, missed))}: the model's forward did not call them. "
                "Only layers that forward calls are driven; these stay vanilla dropout. "
                "Call them in forward, or make them nn.Dropout.",
                NoEffectWarning,
                stacklevel=2,
            )
        self._num_units = {name: num_units[name] for name in self.layers if name in num_units}

    def deactivate(self) -> None:
        """Return every layer to vanilla dropout. Running means are kept for the next step."""
        for layer in self.layers.values():
            layer.deactivate()

    def state_dict(self) -> dict[str, Any]:
        """Hold all that resuming needs: tensors, numbers and dictionaries alone."""
        return {
            "steps_taken": self._steps_taken,
            "nonfinite": self.nonfinite.clone(),
            "progress": self._progress,
            "scores": {name: scores.clone() for name, scores in self.scores.items()},
            "layers": {
                name: {
                    "drop_prob": layer.drop_prob.clone(),
                    "mean_drop_prob": layer.mean_drop_prob.clone(),
                    "active": layer.active,
                }
                for name, layer in self.layers.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken.

        Raises:
            ConfigurationError: If the state is that of other layers, or none.

        """
        if not (isinstance(state, dict) and state.keys() == self.state_dict().keys()):
            raise ConfigurationError(
                f"{describe(state)} was given as a Y-Drop state.",
                "A state is what `YDrop.state_dict` gave, whole.",
                "Load one of those, or start without it.",
            )
        if state["layers"].keys() != self.layers.keys():
            raise ConfigurationError(
                f"A Y-Drop state of the layers {', '.join(map(repr, state['layers']))} was given to a model with "
                f"{', '.join(map(repr, self.layers))}.",
                "A state fits to the network that it was taken from.",
                "Load it into that network, or start without it.",
            )
        device = device_of(self.model)
        self._steps_taken = state["steps_taken"]
        self.nonfinite = state["nonfinite"].to(device, copy=True)
        self._progress = state["progress"]
        self.scores = {name: scores.to(device, copy=True) for name, scores in state["scores"].items()}
        for name, layer in self.layers.items():
            saved = state["layers"][name]
            layer.restore(saved["drop_prob"].to(device), saved["mean_drop_prob"].to(device))
            if saved["active"]:
                layer.activate(self._progress)

    def _check(self, inputs: Inputs, target: Target) -> dict[str, int]:
        """Run phase 1 on a batch, with a look at everything that could be wrong, and count the units of each layer."""
        phase1 = self._phase1(inputs, target)
        with borrowed(self.model, phase1.device), recording(self.layers) as tape, torch.no_grad():
            try:
                output = phase1.output(phase1.inputs, phase1.carried)
            except NotImplementedError as error:
                raise ConfigurationError(
                    f"{type(self.model).__name__} has no forward.",
                    "Phase 1 calls the model with the inputs, to see its outputs.",
                    "Write `forward`, or `ydrop_forward` in a LightningModule whose forward does something else.",
                ) from error
        self.objective.check(output, phase1.target)
        num_units = {}
        for name, calls in tape.items():
            layer = self.layers[name]
            num_units[name] = count_units(name, layer, calls, layer.unit_dim, rows=len(output))
            layer.prepare(num_units[name], calls[0].device)
        self.nonfinite = self.nonfinite.to(phase1.device)
        scores: Any = self._score(inputs, target)
        if not isinstance(scores, dict):
            raise ConfigurationError(
                f"{self.measure!r} gave {describe(scores)}.",
                "A measure gives a dictionary of scores, by the name of the layer.",
                "Return {name: scores} from Measure.score.",
            )
        for name, values in scores.items():
            fits = isinstance(values, Tensor) and values.is_floating_point() and values.ndim == 2 and len(values) > 0
            if fits and name in self.layers and name not in num_units:  # where it is a matter of chance what runs
                num_units[name] = values.shape[1]
                self.layers[name].prepare(values.shape[1], values.device)
            if not fits or values.shape[1] != num_units.get(name):
                raise ConfigurationError(
                    f"{self.measure!r} scored {name!r} with {describe(values)}.",
                    f"A measure gives each layer floating (N, U) scores; {name!r} has {num_units.get(name)} units.",
                    "Sum over positions in Measure.score, or set the layer's `unit_dim`.",
                )
        self._warn_of_what_misleads(scores)
        return {name: num_units[name] for name in scores}

    def _warn_of_what_misleads(self, scores: dict[str, Tensor]) -> None:
        means = {name: values.mean(0) for name, values in scores.items() if values.shape[1] > 1}
        if alike := [name for name, mean in means.items() if mean.std() == 0]:
            warnings.warn(
                f"All units of {', '.join(map(repr, alike))} have the same score in the first batch: units that do not "
                "differ are ranked by their position, or where the score is 0 their probabilities stay what they are. "
                "The objective may not depend on these layers, the labels of these samples may not count, or the "
                "layers run under torch.no_grad() or in activation checkpoints without use_reentrant=False. "
                "See what `layer_conductance` gives for them, or choose another objective.",
                NoEffectWarning,
                stacklevel=4,
            )
        if mixing := [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, BATCH_NORMS) and not module.track_running_stats
        ]:
            warnings.warn(
                f"{', '.join(map(repr, mixing))} normalise by the batch at hand in evaluation too, so that in phase 1 "
                "the points of all paths mix. Set track_running_stats=True for scores of each sample by itself.",
                UserWarning,
                stacklevel=4,
            )

    def _phase1(self, inputs: Inputs, target: Target) -> Request:
        return request_of(
            self.model,
            self.forward,
            self._signature,
            self.layers,
            self._unit_dims,
            inputs,
            target,
            baseline=self.baseline,
            interpolate_at=self.interpolate_at,
            objective=self.objective,
            n_steps=self.n_steps,
            quadrature=self.quadrature,
            generator=self._generator("measure"),
        )

    def _score(self, inputs: Inputs, target: Target) -> dict[str, Tensor]:
        """Draw samples of the batch and measure them."""
        phase1 = self._phase1(inputs, target)
        batch_size = phase1.num_samples
        wanted = self.num_samples
        if wanted is None:
            # As many as there are rows for, where the start takes one row or one for each sample.
            one_start = self.quadrature == "right" and not phase1.carried and all(len(s) == 1 for s in phase1.starts)
            wanted = max(1, (batch_size - 1) // self.n_steps if one_start else batch_size // (self.n_steps + 1))
        elif wanted == "all":
            wanted = batch_size
        if wanted < batch_size:
            generator = self._generator(f"samples of rank {rank()}")
            drawn = torch.randperm(batch_size, generator=generator, device="cpu")[:wanted]
            phase1 = phase1.take(drawn.to(phase1.device, non_blocking=True))
        # More rows at once than training has would need more memory; where one path has more, it has to be.
        phase1 = replace(phase1, max_rows=max(batch_size, self.n_steps + 1), copied=self._copied)
        return self.measure.score(settled(phase1, self.interpolate_at, self.baseline))

    def _check_widths(self, scores: dict[str, Tensor]) -> None:
        for name, values in scores.items():
            before, now = self._num_units.get(name, values.shape[1]), values.shape[1]
            if now != before:
                raise ConfigurationError(
                    f"The layer {name!r} had {before} units in an earlier batch, and has {now} in this one.",
                    "Units are features or channels, of which all batches have as many; positions are no units.",
                    "Choose the layer's `unit_dim`, or leave it out: as nn.Dropout it stays what it is.",
                )

    def _averages(self, scores: dict[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
        """Average over samples (Eq. 4), those of all ranks: of layers of one width, by their names, as one (L, U)."""
        if world_size() > 1:
            scores = {name: mean.unsqueeze(0) for name, mean in self._averages_of_all_ranks(scores).items()}
        alike: dict[tuple[torch.Size, torch.device], list[str]] = {}
        for name in self.layers:
            if name in scores:
                alike.setdefault((scores[name].shape, scores[name].device), []).append(name)
        for names in alike.values():
            yield names, torch.stack([scores[name].detach() for name in names]).mean(1, dtype=torch.float32)

    def _averages_of_all_ranks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average over the samples of all ranks: (U,) for each layer."""
        # Sums and counts of all layers in one message: ranks may have samples in different number.
        device = self.nonfinite.device
        parts = []
        for name, size in self._num_units.items():
            values = scores.get(name, torch.empty(0, size, device=device)).detach().to(device, torch.float32)
            parts += [values.sum(0), torch.full((1,), float(len(values)), dtype=torch.float32, device=device)]
        flat = torch.cat(parts)
        add_over_ranks(flat)
        totals = iter(torch.split(flat, [length for size in self._num_units.values() for length in (size, 1)]))
        # Of a layer that no rank has called, 0, which rank nothing.
        return {name: next(totals) / next(totals).clamp(min=1) for name in self._num_units}

    def _generator(self, purpose: str) -> torch.Generator:
        """Make a source of chance that depends on the seed, the step and the purpose alone: nothing to save or lose."""
        # Hashed, since torch's CPU generator looks at no more than 32 bits of a seed.
        digest = hashlib.blake2b(f"{self.seed} {self._steps_taken} {purpose}".encode(), digest_size=4).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def driven_layers(model: nn.Module) -> dict[str, ConductanceDropout]:
    """Find the layers that Y-Drop drives, by name.

    Raises:
        ConfigurationError: If there are none.

    """
    found = {name: layer for name, layer in named_modules(model).items() if isinstance(layer, ConductanceDropout)}
    if not found:
        there = dropout_like_modules(model)
        raise ConfigurationError(
            f"{type(model).__name__} holds no ConductanceDropout; dropout-like modules in it: "
            f"{', '.join(there) if there else 'none'}.",
            "Y-Drop drives ConductanceDropout layers.",
            "Put ConductanceDropout(p) where nn.Dropout(p) or F.dropout stood, or add one behind each hidden layer.",
        )
    return found


def check_settings(
    owner: str,
    *,
    elasticity: float,
    buckets: Buckets,
    initial_drop_prob: float,
    n_steps: int,
    num_samples: NumSamples,
    baseline: Baseline,
    quadrature: str,
    measure: Measure,
    objective: Objective,
    interpolate_at: str | None,
    seed: int,
    every_n_batches: int,
) -> None:
    """Check the settings that the engine and what stands above it share.

    Raises:
        ConfigurationError: If one is out of range; it speaks of `owner`, the class that the user called.

    """
    check_fraction(owner, "elasticity", elasticity, example=1e-3)
    if not isinstance(buckets, Buckets):
        raise ConfigurationError(
            f"{owner}(buckets={describe(buckets)}) was given.",
            "`buckets` is an instance of lightning_ydrop.Buckets.",
            "Pass, for example, buckets=Buckets(strong_fraction=0.3).",
        )
    check_rate(owner, "initial_drop_prob", initial_drop_prob)
    check_count(owner, "n_steps", n_steps, minimum=1, example=5)
    if num_samples not in (None, "all"):
        check_count(owner, "num_samples", num_samples, minimum=1, example=12)
    check_baseline(owner, baseline)
    check_choice(owner, "quadrature", quadrature, QUADRATURES)
    check_measure(owner, measure)
    check_objective(owner, objective)
    if interpolate_at is not None and not (isinstance(interpolate_at, str) and interpolate_at):
        raise ConfigurationError(
            f"{owner}(interpolate_at={describe(interpolate_at)}) was given.",
            "`interpolate_at` is the name of a module, or None where the path lies between inputs.",
            'Pass, for example, interpolate_at="embedding".',
        )
    check_count(owner, "seed", seed, minimum=0, example=0)
    check_count(owner, "every_n_batches", every_n_batches, minimum=1, example=5)
