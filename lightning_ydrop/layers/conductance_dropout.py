"""The layer that Y-Drop drives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lightning_ydrop.checks import check_flag, check_rate, check_unit_dim
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.masking import channel_dropout, is_unbatched, unit_dropout, vanilla_dropout
from lightning_ydrop.layers.tracing import can_be_leaf, is_scripting, leaf_call
from lightning_ydrop.torch_internals import base_of, copy_each

# Layers of torch that drop whole channels, and how many dimensions they expect after (B, C).
SPATIAL_DIMS: dict[type[nn.Module], int] = {nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


class ConductanceDropout(nn.Module):
    """Dropout with a probability for each unit. `YDrop` or `YDropCallback` sets them before each training step.

    A driven layer, one whose probabilities are in use, returns `x * m / (1 - mean_drop_prob)` with
    `m ~ Bernoulli(1 - drop_prob)` (sec. 4.1, arXiv 2409.09088). Any other layer is torch's own dropout at rate `p`: it
    is `nn.Dropout` on (B, U) or if `elementwise`. On more dimensions it draws once for each sample and unit, as
    `nn.Dropout1d`, `2d` and `3d` do for channels. In evaluation mode the layer returns its input itself.

    The probabilities are not in the `state_dict`, so checkpoints are the same as with `nn.Dropout`. The state of the
    engine or callback holds them.

    A layer that `convert_dropout` put in place of an nn.Dropout1d, 2d or 3d draws as the old layer did on every input
    that torch accepts. If torch takes an input for one sample without a batch dimension, as nn.Dropout1d does on
    (C, L), the layer drops entries of dimension 0 at rate `p`, driven or not.

    torch.fx traces the layer as one call, as it does nn.Dropout. torch.jit.script compiles it with the rates, tensors
    and state of that moment: a layer that becomes active later stays vanilla dropout in the scripted model.

    Args:
        p: Drop rate of the layer when it is not driven, as while annealing, in [0, 1). 0 drops nothing. Setting the
            attribute `p` later changes the rate, in compiled models too.
        unit_dim: Dimension of the units: 1 for the features of (B, U) and the channels of (B, C, H, W), -1 for the
            features of (B, T, U). It differs from `batch_dim`.
        elementwise: Draw for each element, with the probability of its unit. Otherwise draw for each sample and unit.
        batch_dim: Dimension of the samples: 0 for (B, *), 1 for (T, B, U). It matters for inputs of three or more
            dimensions, if not `elementwise`.
        shared_masks: Draw once for all samples of a batch, instead of for each.

    Attributes:
        drop_prob: Probability that a unit is dropped, float32, shape (U,). During a linear transition it is the
            probability at its end. Empty before the first update.
        mean_drop_prob: Running mean of `drop_prob` (Eq. 6), float32, shape (U,). Empty before the first update.
        active: Whether the two are in use.

    Raises:
        ConfigurationError: If an argument is out of range, or `unit_dim` equals `batch_dim`.

    Example:
        >>> layer = ConductanceDropout(0.5)
        >>> layer.eval()(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])

    """

    # TorchScript would compile these properties, and cannot.
    __jit_unused_properties__ = ("p", "replaced")

    def __init__(
        self,
        p: float = 0.5,
        unit_dim: int = 1,
        elementwise: bool = False,
        batch_dim: int = 0,
        shared_masks: bool = False,
    ) -> None:
        super().__init__()
        check_flag("ConductanceDropout", "elementwise", elementwise)
        self.shared_masks = check_flag("ConductanceDropout", "shared_masks", shared_masks)
        self.unit_dim, self.batch_dim = _checked_dims(unit_dim, batch_dim)
        self.elementwise = bool(elementwise)
        self.replaced = ()
        # The number of the engine that sets the probabilities. Of several, the one that was made last.
        self.driver = 0
        self.reset()
        self.p = p

    @property
    def p(self) -> float:
        """Drop rate of the layer when it is not driven, in [0, 1)."""
        return self._p

    @p.setter
    def p(self, p: float) -> None:
        check_rate("ConductanceDropout", "p", p)
        # An int stays one, to be shown as torch shows it. A NumPy number becomes a float.
        self._p: float = p if isinstance(p, int) else float(p)
        if not self.active:
            self._apply_vanilla_rate()

    @property
    def replaced(self) -> tuple[nn.Module, ...]:
        """The layer that `convert_dropout` put this one in place of, or an empty tuple."""
        return self._replaced

    @replaced.setter
    def replaced(self, replaced: tuple[nn.Module, ...]) -> None:
        # A module in a tuple is no submodule.
        self._replaced = replaced
        # A number, because compiled code and TorchScript read it in forward.
        self._num_spatial_dims = SPATIAL_DIMS.get(type(replaced[0]), 0) if replaced else 0

    def reset(self) -> None:
        """Forget all updates, as if the layer was new."""
        self.active = False
        # Plain tensors, not buffers. Buffers whose size is found later break strict loading, weight averaging and DDP.
        self.drop_prob = torch.empty(0)
        self.mean_drop_prob = torch.empty(0)
        # Forward reads these two. They equal the two above, or lie between the vanilla rate and those.
        self._applied_drop_prob = torch.empty(0)
        self._applied_mean = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of `x` in training mode. In evaluation mode return `x` itself."""
        # TorchScript does not compile what is under this condition, if it stands alone.
        if not is_scripting():  # noqa: SIM102
            if isinstance(x, Proxy) and can_be_leaf(self, ConductanceDropout.forward, x):
                return leaf_call(self, x)
        if not self.training:
            return x
        if self.shared_masks and x.ndim > 1:
            shape = list(x.shape)
            shape[self.batch_dim if x.ndim > 2 else 0] = 1
            return x * self._drop(x.new_ones(shape))
        return self._drop(x)

    def _drop(self, x: Tensor) -> Tensor:
        if self._is_driven() and not self.is_unbatched(x):
            return unit_dropout(
                x, self._applied_drop_prob, self._applied_mean, self.unit_dim, self.elementwise, self.batch_dim
            )
        p = float(self._p)  # TorchScript takes no int for a float
        if self._num_spatial_dims > 0:
            return channel_dropout(x, p, self._num_spatial_dims)
        return vanilla_dropout(x, p, self.unit_dim, self.elementwise, self.batch_dim)

    def is_unbatched(self, x: Tensor) -> bool:
        """Tell whether the layer takes an input for a single sample without a batch dimension, as torch's own would.

        This happens to layers that replaced an nn.Dropout1d or 3d, for example to an nn.Dropout1d on (B, U). They drop
        entries of dimension 0 then, and cannot be driven.

        Args:
            x: An input of the layer.

        """
        return self._num_spatial_dims > 0 and is_unbatched(x.ndim, self._num_spatial_dims)

    def prepare(self, num_units: int, device: torch.device) -> None:
        """Set the number of units before the first update. The layer stays vanilla dropout.

        Compiled code always reads the probabilities of a prepared layer. They are all `p` while the layer is not
        active, so the layer is not compiled again when it becomes active or `p` changes.

        Args:
            num_units: U.
            device: The device of the activations.

        Raises:
            ConfigurationError: If the layer had a different number of units before.

        """
        if len(self._applied_drop_prob) == 0:
            with torch.inference_mode(False):  # training cannot update a tensor that was made in inference mode
                self._applied_drop_prob = torch.full((num_units,), self.p, dtype=torch.float32, device=device)
                self._applied_mean = self._applied_drop_prob.clone()
        elif len(self._applied_drop_prob) != num_units:
            raise ConfigurationError(
                f"A ConductanceDropout of {len(self._applied_drop_prob)} units was given probabilities for "
                f"{num_units}.",
                "A layer keeps the number of units of its first update.",
                "Use a separate layer for activations of another width, or load the state of this network.",
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
        """Set the probabilities of this step, move the running mean (Eq. 6, arXiv 2409.09088), and become active.

        Args:
            drop_prob: `g`, float32, shape (U,), in [0, 1), on the device of the activations.
            elasticity: `alpha` of `p[n] = (1 - alpha) p[n-1] + alpha g[n]`.
            initial_drop_prob: `p[0]` of the first update. If the first update is not accepted, it is the drop
                probability too.
            progress: How far to go from the vanilla rate `p`, at 0, to the probabilities, at 1.
            accept: A single boolean on the device of `drop_prob`. If False, the probabilities do not change. The host
                never reads it, so it does not wait for the device.

        Raises:
            ConfigurationError: If the layer had a different number of units before.

        """
        # Made on the CPU, whatever the default device is: the copy there would make the host wait.
        weights = torch.tensor([[[1.0]], [[elasticity]]], dtype=torch.float32, device="cpu")
        weights = weights.to(drop_prob.device, non_blocking=True)
        update_layers(
            [self],
            drop_prob.unsqueeze(0),
            weights=weights if accept is None else weights * accept,
            initial_drop_prob=[initial_drop_prob],
            progress=progress,
        )

    def activate(self, progress: float = 1.0) -> None:
        """Use the probabilities of the last update.

        Args:
            progress: How far to go from the vanilla rate `p`, at 0, to the probabilities, at 1.

        """
        activate_layers([self], progress)

    @contextmanager
    def dropping_at_mean(self) -> Iterator[None]:
        """Drop at the running mean of all probabilities so far, then go back."""
        was_active = self.active
        applied = self._applied_drop_prob.clone(), self._applied_mean.clone()
        try:
            self._applied_drop_prob.copy_(self.mean_drop_prob)
            self._applied_mean.copy_(self.mean_drop_prob)
            self.active = True
            yield
        finally:
            self.active = was_active
            self._applied_drop_prob.copy_(applied[0])
            self._applied_mean.copy_(applied[1])
            if not was_active:  # `p` may be another by now
                self._apply_vanilla_rate()

    def restore(self, drop_prob: Tensor, mean_drop_prob: Tensor) -> None:
        """Copy what the attributes `drop_prob` and `mean_drop_prob` of a layer held.

        Args:
            drop_prob: Float32, shape (U,), or empty, on the device of this layer's activations.
            mean_drop_prob: The same.

        """
        self.reset()
        if len(drop_prob) > 0:
            self.prepare(len(drop_prob), drop_prob.device)
            self.drop_prob, self.mean_drop_prob = drop_prob.clone(), mean_drop_prob.clone()

    def deactivate(self) -> None:
        """Return to vanilla dropout. The running mean stays for the next update."""
        self._apply_vanilla_rate()
        self.active = False

    def extra_repr(self) -> str:
        """Show the arguments, the last two if they are not the default, and the rates of a driven layer."""
        others = f", batch_dim={self.batch_dim}" if self.batch_dim != 0 else ""
        others += ", shared_masks=True" if self.shared_masks else ""
        rates = ""
        if self.active:
            low, high = (float(rate) for rate in self.drop_prob.aminmax())
            rates = f", driven: {len(self.drop_prob)} units dropped at {low:.2f} to {high:.2f}"
        return f"p={self.p}, unit_dim={self.unit_dim}, elementwise={self.elementwise}{others}{rates}"

    def _is_driven(self) -> bool:
        if torch.compiler.is_compiling():
            # Compiled code that depended on `active` would be compiled again when the layer becomes active.
            return len(self._applied_drop_prob) > 0
        return self.active

    def _apply_vanilla_rate(self) -> None:
        # In place, because compiled code keeps reading the same tensors.
        self._applied_drop_prob.fill_(self.p)
        self._applied_mean.fill_(self.p)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ConductanceDropout":
        """Follow the model to its device but not to its dtype. In bfloat16 a running mean would not move."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.drop_prob = _moved(fn, self.drop_prob)
        self.mean_drop_prob = _moved(fn, self.mean_drop_prob)
        self._applied_drop_prob = _moved(fn, self._applied_drop_prob)
        self._applied_mean = _moved(fn, self._applied_mean)
        return self


def update_layers(
    layers: Sequence[ConductanceDropout],
    drop_prob: Tensor,
    *,
    weights: Tensor,
    initial_drop_prob: Sequence[float],
    progress: float = 1.0,
) -> None:
    """Update L layers of the same width on one device at once, each as `ConductanceDropout.update` would.

    The number of operations, and so of kernel launches on a GPU, does not depend on L.

    Args:
        layers: The layers.
        drop_prob: `g`, shape (L, U).
        weights: How far the probabilities and the running means move towards `drop_prob`: float32, shape (2, L, 1) or,
            for all layers alike, (2, 1, 1). 1 and the elasticity, or 0 for layers that keep what they have.
        initial_drop_prob: As for one layer, for each of them.
        progress: As for one layer.

    Raises:
        ConfigurationError: If a layer had a different number of units before.

    """
    rates = _shared_rates(layers)
    if rates is None or rates.shape[2] != drop_prob.shape[1]:
        for layer in layers:
            layer.prepare(drop_prob.shape[1], drop_prob.device)
        rates = _share_rates(layers, initial_drop_prob)
    rates.lerp_(drop_prob, weights)
    activate_layers(layers, progress)


def activate_layers(layers: Sequence[ConductanceDropout], progress: float) -> None:
    """Make layers use the probabilities of their last update.

    Args:
        layers: Layers that have had an update.
        progress: How far to go from the vanilla rate `p`, at 0, to the probabilities, at 1.

    """
    applied = [tensor for layer in layers for tensor in (layer._applied_drop_prob, layer._applied_mean)]
    driven = [tensor for layer in layers for tensor in (layer.drop_prob, layer.mean_drop_prob)]
    if progress != 1.0:
        vanilla = [layer.p for layer in layers for _ in range(2)]
        driven = [torch.full_like(each, p).lerp_(each, progress) for each, p in zip(driven, vanilla, strict=True)]
    copy_each(applied, driven)
    for layer in layers:
        if not layer.active:  # setting an attribute of a module is slow
            layer.active = True


def _shared_rates(layers: Sequence[ConductanceDropout]) -> Tensor | None:
    """Find the tensor (2, L, U) that layers share since an update together: see `_share_rates`.

    None where they do not: a layer that was copied, moved or restored since has tensors of its own.
    """
    held = [layer.drop_prob for layer in layers] + [layer.mean_drop_prob for layer in layers]
    shared, num_units = base_of(held[0]), len(held[0])
    if shared is None or shared.shape != (2, len(layers), num_units):
        return None
    are_rows = all(
        base_of(tensor) is shared and tensor.storage_offset() == row * num_units for row, tensor in enumerate(held)
    )
    return shared if are_rows else None


def _share_rates(layers: Sequence[ConductanceDropout], initial_drop_prob: Sequence[float]) -> Tensor:
    """Move what layers hold into one tensor (2, L, U), of which each holds two rows, so that one operation updates all.

    Nothing else has to know of it: a row is a tensor like any other.
    """
    with torch.inference_mode(False):
        shared = layers[0]._applied_drop_prob.new_empty(2, len(layers), len(layers[0]._applied_drop_prob))
        for place, (layer, initial) in enumerate(zip(layers, initial_drop_prob, strict=True)):
            drop_prob, mean_drop_prob = shared[0, place], shared[1, place]
            is_new = len(layer.drop_prob) == 0
            drop_prob.copy_(torch.full_like(drop_prob, initial) if is_new else layer.drop_prob)
            mean_drop_prob.copy_(drop_prob if is_new else layer.mean_drop_prob)
            layer.drop_prob, layer.mean_drop_prob = drop_prob, mean_drop_prob
    return shared


def _checked_dims(unit_dim: int, batch_dim: int) -> tuple[int, int]:
    """Refuse dimensions that are no whole numbers or are the same, and make NumPy's integers Python's."""
    unit_dim, batch_dim = (
        int(dim) if isinstance(dim, Integral) and not isinstance(dim, bool) else dim for dim in (unit_dim, batch_dim)
    )
    if type(batch_dim) is not int:
        raise ConfigurationError(
            f"ConductanceDropout(batch_dim={describe(batch_dim)}) was given.",
            "`batch_dim` is the dimension of the samples, a whole number.",
            "Pass 0 for (B, U), or 1 for (T, B, U).",
        )
    if type(unit_dim) is not int or batch_dim == 0:
        check_unit_dim("ConductanceDropout", unit_dim)
    if unit_dim == batch_dim:
        raise ConfigurationError(
            f"ConductanceDropout(unit_dim={unit_dim}, batch_dim={batch_dim}) was given.",
            "`unit_dim` and `batch_dim` are different dimensions.",
            "Pass, for example, unit_dim=-1, batch_dim=1 for (T, B, U).",
        )
    return unit_dim, batch_dim


def _moved(fn: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """Move a tensor to the device that `fn` moves it to. From the meta device, which has no values, make it empty."""
    device = fn(state).device
    return torch.empty(0, device=device) if state.is_meta and device.type != "meta" else state.to(device)
