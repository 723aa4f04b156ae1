"""Y-Drop for any training loop: one step of phase 1, and the probabilities that follow from it."""

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import (
    ConfigurationError,
    NoEffectWarning,
    check_choice,
    check_count,
    check_fraction,
    check_rate,
    describe,
)
from lightning_ydrop.functional.attribution import QUADRATURES, Quadrature
from lightning_ydrop.functional.rates import Buckets, bucket_probabilities, draw_rates
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.phase1.attribution import count_units, select_layers
from lightning_ydrop.phase1.batches import Baseline, Inputs, as_inputs, check_baseline, start_points, take_rows
from lightning_ydrop.phase1.measures import Conductance, Measure, Phase1, check_measure
from lightning_ydrop.phase1.objectives import Target, check_pairs, check_target
from lightning_ydrop.phase1.recording import borrowed, recording


class YDrop:
    """Drive the `ConductanceDropout` layers of a model: drop the units that matter most more often.

    Call `step` with the batch before each training step on it (Fig. 1, arXiv 2409.09088): phase 1 scores the units
    of every layer on some samples of the batch, in one forward and one backward pass of at most
    `n_steps * num_samples + 1` rows; the units with the highest scores get the high rate, the others the low one, and
    phase 2 is the training step itself. Phase 1 changes nothing but these probabilities: parameters, gradients,
    BatchNorm statistics, metrics, training flags and torch's random stream stay as they are.

    With `quadrature` "left" or "trapezoid" the gradient at the start of the path differs with each sample's target, so
    there each sample has a start of its own: `(n_steps + 1) * num_samples` rows.

    Args:
        model: A model with `ConductanceDropout` layers, called as `model(*inputs)`; not its DDP wrapper.
        elasticity: `alpha` of the running mean (Eq. 6), in [0, 1]: 0 keeps `initial_drop_prob`, 1 follows each step.
        buckets: The two buckets' rates and sizes (Eq. 5 and 8).
        initial_drop_prob: `p_0`, where the running mean starts, in [0, 1).
        n_steps: `n_c`, steps on the path from the baseline to each sample, at least 1.
        num_samples: `B_c`, samples drawn from the batch (Eq. 9), at least 1, or all where the batch has fewer. None
            takes `max(1, (B - 1) // n_steps)`, so that phase 1 has no more rows than the batch: 12 for 64, 6 for 32.
        baseline: Where the paths start, in the model's input space: a number, a tensor of the shape of one sample, or a
            tuple of one for each input.
        quadrature: Where on each step the gradient is taken: "right" (Eq. 2), "left" (Captum), or "trapezoid".
        measure: What makes a unit important.
        seed: Of the samples drawn and the rates, which depend on it and the number of steps taken alone.

    Attributes:
        layers: The layers driven, by name.
        scores: The last score of every layer by name, float32, shape (U,), on the device of its activations.

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
        num_samples: int | None = None,
        baseline: Baseline = 0.0,
        quadrature: Quadrature = "right",
        measure: Measure = Conductance(),
        seed: int = 0,
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
            seed=seed,
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
        self.seed = seed
        self.layers: dict[str, ConductanceDropout] = {
            name: layer for name, layer in select_layers(model, None).items() if isinstance(layer, ConductanceDropout)
        }
        self.scores: dict[str, Tensor] = {}
        self._steps_taken = 0
        self._rehearsed = False

    def step(self, inputs: Inputs, target: Target = None) -> None:
        """Run phase 1 on a batch, update the layers' probabilities and make them active.

        The first step rehearses first. A layer that the forward pass does not call stays as it was.

        Args:
            inputs: A floating tensor (B, *), or a tuple of them, on the model's device.
            target: Class index (B,), soft labels (B, C), or None for the sum of the outputs.

        Raises:
            ConfigurationError: If inputs or target do not fit to the model.

        """
        if not self._rehearsed:
            self.rehearse(inputs, target)
        generator = self._generator("rates")
        low = draw_rates(self.buckets.low, len(self.layers), generator).tolist()
        high = draw_rates(self.buckets.high, len(self.layers), generator).tolist()
        rates = dict(zip(self.layers, zip(low, high, strict=True), strict=True))
        self.scores = self._score(inputs, target)
        self._steps_taken += 1
        for name, scores in self.scores.items():
            drop_prob = bucket_probabilities(scores, *rates[name], self.buckets.strong_fraction)
            self.layers[name].update(drop_prob, elasticity=self.elasticity, initial_drop_prob=self.initial_drop_prob)

    def rehearse(self, inputs: Inputs, target: Target = None) -> None:
        """Run phase 1 on a batch, check everything on the way, and throw the scores away.

        It looks at the target's values, so that a device has to catch up once.

        Args:
            inputs: As for `step`.
            target: As for `step`.

        Raises:
            ConfigurationError: If inputs, target or measure do not fit to the model.

        """
        listed = as_inputs(inputs)
        check_pairs(target, len(listed[0]))
        with borrowed(self.model, listed[0].device), recording(self.layers) as tape, torch.no_grad():
            output = self.model(*listed)
        check_target(output, target)
        scores = self._score(inputs, target)
        for name, values in scores.items():
            layer = self.layers[name]
            num_units = count_units(name, layer, tape[name][0], layer.unit_dim, rows=len(listed[0]))
            if values.shape != (num_units,):
                raise ConfigurationError(
                    f"{self.measure!r} scored {name!r} with {describe(values)} after averaging over samples.",
                    f"A measure gives each layer (N, U) scores; {name!r} has {num_units} units.",
                    "Sum over positions in Measure.score, or set the layer's `unit_dim`.",
                )
        if missed := [name for name in self.layers if name not in scores]:
            warnings.warn(
                f"Y-Drop has no score for {', '.join(map(repr, missed))}: the model's forward did not call them. "
                "Only layers that forward calls are driven; these stay vanilla dropout. "
                "Call them in forward, or make them nn.Dropout.",
                NoEffectWarning,
                stacklevel=2,
            )
        self._rehearsed = True

    def deactivate(self) -> None:
        """Return every layer to vanilla dropout. Running means are kept for the next step."""
        for layer in self.layers.values():
            layer.active = False

    def state_dict(self) -> dict[str, Any]:
        """Hold all that resuming needs: tensors, numbers and dictionaries alone."""
        return {
            "steps_taken": self._steps_taken,
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
            ConfigurationError: If the state is that of other layers.

        """
        if state["layers"].keys() != self.layers.keys():
            raise ConfigurationError(
                f"A Y-Drop state of the layers {', '.join(map(repr, state['layers']))} was given to a model with "
                f"{', '.join(map(repr, self.layers))}.",
                "A state fits to the network that it was taken from.",
                "Load it into that network, or start without it.",
            )
        self._steps_taken = state["steps_taken"]
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        for name, layer in self.layers.items():
            saved = state["layers"][name]
            layer.drop_prob = saved["drop_prob"].to(device, copy=True)
            layer.mean_drop_prob = saved["mean_drop_prob"].to(device, copy=True)
            layer.active = saved["active"]

    def _score(self, inputs: Inputs, target: Target) -> dict[str, Tensor]:
        """Draw samples of the batch, measure them, and average over them (Eq. 4)."""
        listed = as_inputs(inputs)
        batch_size = len(listed[0])
        wanted = max(1, (batch_size - 1) // self.n_steps) if self.num_samples is None else self.num_samples
        starts = start_points(listed, self.baseline)
        if wanted < batch_size:
            drawn = torch.randperm(batch_size, generator=self._generator("samples"))[:wanted]
            drawn = drawn.to(listed[0].device, non_blocking=True)
            listed = take_rows(listed, drawn)
            starts = tuple(start if len(start) == 1 else start.index_select(0, drawn) for start in starts)
            target = None if target is None else target.index_select(0, drawn)
        scores = self.measure.score(
            Phase1(
                model=self.model,
                layers=self.layers,
                inputs=listed,
                target=target,
                starts=starts,
                n_steps=self.n_steps,
                quadrature=self.quadrature,
                generator=self._generator("measure"),
            )
        )
        return {name: values.mean(0, dtype=torch.float32) for name, values in scores.items()}

    def _generator(self, purpose: str) -> torch.Generator:
        """Make a source of chance that depends on the seed, the step and the purpose alone: nothing to save or lose."""
        # Hashed, since torch's CPU generator looks at no more than 32 bits of a seed.
        digest = hashlib.blake2b(f"{self.seed} {self._steps_taken} {purpose}".encode(), digest_size=4).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def check_settings(
    owner: str,
    *,
    elasticity: float,
    buckets: Buckets,
    initial_drop_prob: float,
    n_steps: int,
    num_samples: int | None,
    baseline: Baseline,
    quadrature: str,
    measure: Measure,
    seed: int,
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
    if num_samples is not None:
        check_count(owner, "num_samples", num_samples, minimum=1, example=12)
    check_baseline(owner, baseline)
    check_choice(owner, "quadrature", quadrature, QUADRATURES)
    check_measure(owner, measure)
    check_count(owner, "seed", seed, minimum=0, example=0)
