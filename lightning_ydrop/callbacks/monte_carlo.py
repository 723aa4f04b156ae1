"""Averages over dropout masks in a Trainer: what `predict` returns, and what `test` measures."""

import hashlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lightning_ydrop.callbacks.company import check_alone
from lightning_ydrop.callbacks.patterns import may_build_later
from lightning_ydrop.checks import check_count
from lightning_ydrop.errors import NoEffectWarning
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.models.batches import own_method, read_batch
from lightning_ydrop.progress import RichBar
from lightning_ydrop.uncertainty.averaging import subject_of
from lightning_ydrop.uncertainty.draws import MaskSharing
from lightning_ydrop.uncertainty.masks import check_drops
from lightning_ydrop.uncertainty.monte_carlo import warn_of_vanilla_rates
from lightning_ydrop.uncertainty.outputs import Noise
from lightning_ydrop.uncertainty.passes import Subject, batch_size_of
from lightning_ydrop.uncertainty.settings import Settings, checked_settings
from lightning_ydrop.uncertainty.streams import warn_of_equal_ranks
from lightning_ydrop.uncertainty.tasks import AnyResult, Average, TaskName

OWNER = "MonteCarloCallback"


class MonteCarloCallback(Callback):
    """Predict and test with the average over dropout masks, without a change to the LightningModule.

    `Trainer.predict` returns for each batch what `monte_carlo` returns, on the CPU: the mean, its uncertainty, and on
    request the samples. The module's `predict_step` does not run. Inputs are read from the batch as YDropCallback reads
    them: by `ydrop_inputs` if the module has it, or by the adapter.

    In `Trainer.test` the module's `test_step` runs as it is, and its calls of `self(...)` return the average over masks
    in the form of the model's own output: logits whose softmax or sigmoid is the average probability, or the mean, with
    the total variance where the model predicts one. Losses and metrics are then those of the average.

    A module with a method `ydrop_forward` is averaged there, in both. Fitting and validation stay as they are. Each
    process of a distributed run predicts its own batches; metrics of torchmetrics put a test together as ever.

    Args:
        num_samples: Number of masks, at least 1.
        task: "classification", "regression" or "multilabel", as for `monte_carlo`.
        noise: For regression, what the model predicts besides the mean, as for `monte_carlo`: None, "variance" or
            "log_variance".
        return_samples: Whether `predict` also returns what each mask gives. Trainer.predict keeps all it returns, in
            the memory of the CPU: 4 MB for 100 masks, 1,000 samples and 10 classes.
        shared_masks: Whether all samples of a batch get the same masks, as for `monte_carlo`.
        seed: Makes masks repeatable, and other ones in each process. The same data in the same batches then give the
            same results, and torch's random streams stay as they are. None: torch's random streams.
        class_dim: Dimension of the classes in the output, as for `monte_carlo`.
        batch_dim: Dimension of the samples in inputs and output, as for `monte_carlo`: 1 for models of (T, B, F).
        max_rows: At most this many rows pass through the model at once, as for `monte_carlo`.
        adapter: It reads inputs from a batch of `predict`, unless the module has a method `ydrop_inputs`.
        progress_bar: Whether a bar shows the masks of a batch that takes more than five seconds. It appears beneath the
            Trainer's own bar of batches, if that is one of Lightning's.
        functional: Whether calls of F.dropout and its kin drop too, as for `monte_carlo`.

    Raises:
        ConfigurationError: If an argument is out of range; before the first batch, if nothing in the model drops, or
            the Trainer has several of these callbacks.

    Example:
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        ...
        ...     def forward(self, x):
        ...         return self.net(x)
        >>> callback = MonteCarloCallback(num_samples=20)
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_progress_bar=False)
        >>> averages = trainer.predict(Model(), DataLoader(torch.randn(32, 4), batch_size=16))
        >>> averages[0].probabilities.shape, averages[0].mutual_information.shape
        (torch.Size([16, 3]), torch.Size([16]))

    """

    def __init__(
        self,
        num_samples: int = 100,
        task: TaskName = "classification",
        noise: Noise | None = None,
        return_samples: bool = False,
        shared_masks: bool = False,
        seed: int | None = None,
        class_dim: int = 1,
        batch_dim: int = 0,
        max_rows: int | None = 4096,
        adapter: Adapter = AutomaticAdapter(),
        progress_bar: bool = True,
        functional: bool = False,
    ) -> None:
        self.settings = checked_settings(
            OWNER,
            num_samples=num_samples,
            task=task,
            noise=noise,
            return_samples=return_samples,
            shared_masks=shared_masks,
            class_dim=class_dim,
            batch_dim=batch_dim,
            max_rows=max_rows,
            progress_bar=progress_bar,
            functional=functional,
        )
        self.seed = None if seed is None else check_count(OWNER, "seed", seed, minimum=0, example=0)
        check_adapter(OWNER, adapter)
        self.adapter = adapter
        self._averager: _Averager | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand in for the module's step, before Lightning looks at its arguments."""
        if stage not in (TrainerFn.PREDICTING, TrainerFn.TESTING):
            return
        check_alone(
            trainer,
            MonteCarloCallback,
            "MonteCarloCallbacks",
            "One of them says what a prediction is.",
            "Leave the others out, or predict once with each.",
        )
        if not (self.settings.functional or may_build_later(pl_module)):
            check_drops(OWNER, pl_module)
        self._give_back()
        bar = trainer.progress_bar_callback
        is_bar_shown = isinstance(bar, (TQDMProgressBar, RichProgressBar)) and bar.is_enabled
        settings = replace(self.settings, progress_bar=self.settings.progress_bar and is_bar_shown)
        generator = _generator(self.seed, trainer.global_rank)
        beneath = bar if isinstance(bar, RichProgressBar) else None
        self._averager = _Averager(pl_module, settings, self.adapter, generator, beneath)
        if stage == TrainerFn.PREDICTING:
            self._averager.stand_in_for_predict_step()
        else:
            self._averager.stand_in_for_test_step()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model without dropout, now that it is all there."""
        self._check(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model without dropout, now that it is all there."""
        self._check(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its step back: Lightning does not call `teardown` then."""
        self._give_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its step back."""
        self._give_back()

    def _check(self, pl_module: LightningModule) -> None:
        if not self.settings.functional:
            check_drops(OWNER, pl_module)
        warn_of_vanilla_rates(OWNER, pl_module)
        if self.seed is None:
            warn_of_equal_ranks(OWNER, f"Pass {OWNER}(seed=...): it makes other masks of it on each.")

    def _give_back(self) -> None:
        if self._averager is not None:
            self._averager.give_back()
        self._averager = None


class _Averager:
    """Stands in for methods of a LightningModule, on the instance, and gives them back.

    Args:
        pl_module: The module.
        settings: How to average.
        adapter: Reads inputs from batches.
        generator: Where masks come from.
        beneath: The Trainer's bar, where it is not tqdm's.

    """

    def __init__(
        self,
        pl_module: LightningModule,
        settings: Settings,
        adapter: Adapter,
        generator: torch.Generator | None,
        beneath: RichProgressBar | None,
    ) -> None:
        self._pl_module, self._settings, self._adapter = pl_module, settings, adapter.without_target()
        self._generator, self._beneath = generator, beneath
        self._sharing = MaskSharing()  # the model stays the same, so what one batch learns holds for the others
        self._former: dict[str, Any] = {}
        self._forward: Callable[..., Any] = pl_module.forward
        self._is_averaging = self._has_averaged = self._has_warned = False
        self._form: Any = None

    def stand_in_for_predict_step(self) -> None:
        """Let `predict_step` return averages."""
        self._put("predict_step", self._predict_step)

    def stand_in_for_test_step(self) -> None:
        """Let calls of the model return averages while `test_step` runs."""
        test_step = self._pl_module.test_step

        @wraps(test_step)  # Lightning looks at its arguments
        def with_averages(*args: Any, **kwargs: Any) -> Any:
            return self._test_step(test_step, *args, **kwargs)

        self._put("test_step", with_averages)

    def give_back(self) -> None:
        """Let the module have its own methods again."""
        for name in list(self._former):
            self._take_away(name)

    def _predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> AnyResult:
        inputs, _ = read_batch(self._pl_module, self._adapter, batch)
        forward = own_method(self._pl_module, "ydrop_forward")
        subject = subject_of(self._pl_module, inputs, forward, self._settings.batch_dim, may_be_empty=True)
        return self._settings.task.result(self._average(self._settings, subject))

    def _test_step(self, test_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = "forward" if own_method(self._pl_module, "ydrop_forward") is None else "ydrop_forward"
        self._forward = getattr(self._pl_module, name)
        # A compiled test_step would be traced through all that averaging does. (The import of dynamo takes seconds.)
        is_compiling = "torch._dynamo" in sys.modules
        disable: Callable[..., Any] = torch.compiler.disable
        self._put(name, disable(self._average_forward) if is_compiling else self._average_forward)
        try:
            output = test_step(*args, **kwargs)
        finally:
            self._take_away(name)
        if not (self._has_averaged or self._has_warned):
            self._has_warned = True
            warnings.warn(
                f"{type(self._pl_module).__name__}.test_step did not call {name} for its predictions, so nothing is "
                "averaged over masks: test metrics are those of one pass in evaluation mode. Let test_step call "
                "self(...), or give the module a method `ydrop_forward` and call that.",
                category=NoEffectWarning,
                stacklevel=2,
            )
        return output

    def _average_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_averaging:  # a forward that calls itself
            return self._forward(*args, **kwargs)
        arguments, batch_dim = (args, kwargs), self._settings.batch_dim
        size = batch_size_of(arguments, arguments, batch_dim, may_be_empty=True)
        subject = Subject(self._pl_module, self._forward, arguments, size, batch_dim)
        settings = replace(self._settings, return_samples=False)
        self._is_averaging = self._has_averaged = True
        try:
            average = self._average(settings, subject, self._note_form)
            return settings.task.output(settings.task.result(average), *self._form)
        finally:
            self._is_averaging, self._form = False, None

    def _average(
        self, settings: Settings, subject: Subject, note_output: Callable[[Any, int], None] | None = None
    ) -> Average:
        beneath = None if self._beneath is None else self._beneath.progress  # there is none before the first batch
        bar_of = None if beneath is None else partial(RichBar, beneath, "masks")
        return settings.average(subject, self._generator, self._sharing, note_output, bar_of)

    def _note_form(self, output: Any, num_rows: int) -> None:
        if self._form is None:
            self._form = (output, num_rows)

    # What passes change is undone, except in objects of this package. So nothing here is kept in closures.

    def _put(self, name: str, method: Callable[..., Any]) -> None:
        own = self._pl_module.__dict__
        self._former[name] = own.get(name)
        own[name] = method

    def _take_away(self, name: str) -> None:
        former = self._former.pop(name)
        if former is None:
            del self._pl_module.__dict__[name]
        else:
            self._pl_module.__dict__[name] = former


def _generator(seed: int | None, rank: int) -> torch.Generator | None:
    """Make a source of masks that depends on the seed and the rank alone."""
    if seed is None:
        return None
    # Hashed: sums would give the second rank the masks that the first one has with the next seed.
    digest = hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
