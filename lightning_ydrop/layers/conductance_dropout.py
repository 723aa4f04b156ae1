"""The layer that Y-Drop drives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ydrop.checks import check_flag, check_rate, check_unit_dim
from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.functional.masking import unit_dropout, vanilla_dropout


class ConductanceDropout(nn.Module):
    """Dropout with a probability for each unit, which `YDrop` or `YDropCallback` sets before each training step.

    Left alone it is torch's own dropout at rate `p`: `nn.Dropout` on (B, U) and where `elementwise`, and
    `nn.Dropout1d`, `2d` or `3d` (one draw for each sample and channel) on the outputs of convolutions. Driven, it
    returns `x * m / (1 - mean_drop_prob)` with `m ~ Bernoulli(1 - drop_prob)` (sec. 4.1, arXiv 2409.09088). In
    evaluation it returns its very input. The probabilities are no part of the `state_dict`, so that checkpoints are
    those of the network with `nn.Dropout`; the engine's or callback's own state holds them.

    Args:
        p: Vanilla drop rate, in [0, 1): 0 drops nothing. For networks that are not driven, and while annealing.
        unit_dim: Dimension of the units: 1 for the features of (B, U) and the channels of (B, C, H, W), -1 for the
            features of (B, T, U). Never 0, which is the batch.
        elementwise: Draw for each element, with the probability of its unit, instead of each sample and unit.

    Attributes:
        drop_prob: Probability that a unit is dropped, or is to be at the end of a linear transition, float32, shape
            (U,); empty until the first update.
        mean_drop_prob: Its running mean (Eq. 6), float32, shape (U,); empty until the first update.
        active: Whether the two are in use.

    Raises:
        ConfigurationError: If `p` or `unit_dim` is out of range.

    Example:
        >>> layer = ConductanceDropout(0.5)
        >>> layer.eval()(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])

    """

    def __init__(self, p: float = 0.5, unit_dim: int = 1, elementwise: bool = False) -> None:
        super().__init__()
        check_rate("ConductanceDropout", "p", p)
        check_unit_dim("ConductanceDropout", unit_dim)
        check_flag("ConductanceDropout", "elementwise", elementwise)
        self.p = p
        self.unit_dim = unit_dim
        self.elementwise = elementwise
        # The layer of torch's in whose place `convert_dropout` has put this one; in a tuple it is no submodule.
        self.replaced: tuple[nn.Module, ...] = ()
        # The engine that sets the probabilities, by its number: of two, the one that was made last.
        self.driver = 0
        self.batch_dim = 0
        self.reset()

    def reset(self) -> None:
        """Forget all updates: the layer is as it was made."""
        self.active = False
        # Plain tensors, not buffers: buffers of a size found later break strict loading, weight averaging and DDP.
        self.drop_prob = torch.empty(0)
        self.mean_drop_prob = torch.empty(0)
        # What forward reads: the two above, or some of the way from the vanilla rate to them.
        self._applied_drop_prob = torch.empty(0)
        self._applied_mean = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of `x` (B, *) in training, or return it untouched in evaluation."""
        if not self.training:
            return x
        if self._is_driven():
            return unit_dropout(x, self._applied_drop_prob, self._applied_mean, self.unit_dim, self.elementwise)
        return vanilla_dropout(x, self.p, self.unit_dim, self.elementwise)

    def prepare(self, num_units: int, device: torch.device) -> None:
        """Learn the number of units before the first update. The layer stays vanilla dropout.

        Compiled code calls a layer that is prepared once and for all with probabilities, equal ones while it is not
        active, so that it is compiled no second time when the layer becomes active.

        Args:
            num_units: U.
            device: That of the activations.

        Raises:
            ConfigurationError: If the layer had another number of units before.

        """
        if len(self._applied_drop_prob) == 0:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be updated in training
                self._applied_drop_prob = torch.full((num_units,), self.p, dtype=torch.float32, device=device)
                self._applied_mean = self._applied_drop_prob.clone()
        elif len(self._applied_drop_prob) != num_units:
            raise ConfigurationError(
                f"A ConductanceDropout of {len(self._applied_drop_prob)} units was given probabilities for "
                f"{num_units}.",
                "The number of units of a layer stays what it was at its first update.",
                "Give activations of different width layers of their own, or load the state of this very network.",
            )

    def update(
        self,
        drop_prob: Tensor,
        *,
        elasticity: float,
        initial_drop_prob: float,
        progress: float = 1.0,
        accept: Tensor | None = None,
    ) -> None:
        """Take this step's probabilities, move the running mean (Eq. 6, arXiv 2409.09088), and become active.

        Args:
            drop_prob: `g`, shape (U,), float32, with values in [0, 1), on the device of the activations.
            elasticity: `alpha` of `p[n] = (1 - alpha) p[n-1] + alpha g[n]`.
            initial_drop_prob: `p[0]`, used at the first update, also of the drop probability itself where the first
                one is not accepted.
            progress: How far to go from the vanilla rate `p` of all units, at 0, to the probabilities, at 1.
            accept: A single boolean on the device of `drop_prob`: where it is False, the probabilities stay as they
                are. It is never read on the host, which would have to wait for it.

        Raises:
            ConfigurationError: If the layer had another number of units before.

        """
        update_layers(
            [self],
            drop_prob.unsqueeze(0),
            elasticity=elasticity,
            initial_drop_prob=initial_drop_prob,
            progress=progress,
            accept=accept,
        )

    def activate(self, progress: float = 1.0) -> None:
        """Use the probabilities of the last update.

        Args:
            progress: How far to go from the vanilla rate `p` of all units, at 0, to the probabilities, at 1.

        """
        activate_layers([self], progress)

    @contextmanager
    def dropping_at_mean(self) -> Iterator[None]:
        """Drop at the running mean of the probabilities of all updates, as the layer has done on average."""
        former = self.active, self._applied_drop_prob.clone(), self._applied_mean.clone()
        try:
            self._applied_drop_prob.copy_(self.mean_drop_prob)
            self._applied_mean.copy_(self.mean_drop_prob)
            self.active = True
            yield
        finally:
            self.active = former[0]
            self._applied_drop_prob.copy_(former[1])
            self._applied_mean.copy_(former[2])

    def restore(self, drop_prob: Tensor, mean_drop_prob: Tensor) -> None:
        """Take back what another layer's attributes of these names held, both of shape (U,), float32, on its device."""
        self.reset()
        if len(drop_prob) > 0:
            self.prepare(len(drop_prob), drop_prob.device)
            self.drop_prob, self.mean_drop_prob = drop_prob.clone(), mean_drop_prob.clone()

    def deactivate(self) -> None:
        """Return to vanilla dropout. The running mean is kept for the next update."""
        self._applied_drop_prob.fill_(self.p)
        self._applied_mean.fill_(self.p)
        self.active = False

    def is_unbatched(self, x: Tensor) -> bool:
        return False

    def extra_repr(self) -> str:
        """Show the arguments, as torch's own layers do."""
        return f"p={self.p}, unit_dim={self.unit_dim}, elementwise={self.elementwise}"

    def _is_driven(self) -> bool:
        if torch.compiler.is_compiling():
            # Whether the layer is active would be compiled in, and becoming active would compile it once more.
            return len(self._applied_drop_prob) > 0
        return self.active

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ConductanceDropout":
        """Follow the model to its device but not to its dtype: in bfloat16 a running mean would stand still."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.drop_prob = _on_the_device_that(fn, self.drop_prob)
        self.mean_drop_prob = _on_the_device_that(fn, self.mean_drop_prob)
        self._applied_drop_prob = _on_the_device_that(fn, self._applied_drop_prob)
        self._applied_mean = _on_the_device_that(fn, self._applied_mean)
        return self


def update_layers(
    layers: Sequence[ConductanceDropout],
    drop_prob: Tensor,
    *,
    elasticity: float,
    initial_drop_prob: float,
    progress: float = 1.0,
    accept: Tensor | None = None,
) -> None:
    """Update L layers of as many units on one device at once, each as `ConductanceDropout.update` would.

    The number of operations, which on a GPU are launches, does not depend on L.

    Args:
        layers: The layers.
        drop_prob: `g`, shape (L, U).
        elasticity: As for one layer.
        initial_drop_prob: As for one layer.
        progress: As for one layer.
        accept: Booleans of shape (L, 1), or a single one for all of them.

    Raises:
        ConfigurationError: If a layer had another number of units before.

    """
    for layer in layers:
        layer.prepare(drop_prob.shape[1], drop_prob.device)
        if len(layer.drop_prob) == 0:
            with torch.inference_mode(False):
                layer.drop_prob = torch.full_like(layer._applied_drop_prob, initial_drop_prob)
                layer.mean_drop_prob = layer.drop_prob.clone()
    kept = [tensor for layer in layers for tensor in (layer.drop_prob, layer.mean_drop_prob)]
    former = torch.stack(kept).view(len(layers), 2, -1)
    # How far each goes to the new probabilities: all the way, as far as elasticity lets the mean, or nowhere.
    weights = torch.tensor([[1.0], [elasticity]], dtype=torch.float32).to(drop_prob.device, non_blocking=True)
    if accept is not None:
        weights = weights * accept.view(-1, 1, 1)
    updated = former.lerp(drop_prob.unsqueeze(1), weights)
    # In place, so that compiled code keeps reading the same tensors.
    torch._foreach_copy_(kept, updated.flatten(0, 1).unbind())
    activate_layers(layers, progress)


def activate_layers(layers: Sequence[ConductanceDropout], progress: float) -> None:
    """Let layers use the probabilities of their last update.

    Args:
        layers: Layers that have been updated.
        progress: How far to go from the vanilla rate `p` of all units, at 0, to the probabilities, at 1.

    """
    applied = [tensor for layer in layers for tensor in (layer._applied_drop_prob, layer._applied_mean)]
    driven = [tensor for layer in layers for tensor in (layer.drop_prob, layer.mean_drop_prob)]
    if progress != 1.0:
        vanilla = [layer.p for layer in layers for _ in range(2)]
        driven = [torch.full_like(each, p).lerp_(each, progress) for each, p in zip(driven, vanilla, strict=True)]
    torch._foreach_copy_(applied, driven)
    for layer in layers:
        if not layer.active:  # a module takes long to set an attribute
            layer.active = True


def _on_the_device_that(fn: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """Move a tensor to where `fn` moves it. From the meta device, where there are no values, comes an empty one."""
    device = fn(state).device
    return torch.empty(0, device=device) if state.is_meta and device.type != "meta" else state.to(device)
