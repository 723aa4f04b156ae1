"""A dropout layer that drops a pattern, at places drawn anew for each sample in each step."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lightning_ydrop.checks import check_flag, check_fraction
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.runs import WHOLE, token_dropout
from lightning_ydrop.functional.stencils import COVERING, make_stencil, stencil_dropout
from lightning_ydrop.layers.patterns import ConvPattern, Pattern, TokenPattern
from lightning_ydrop.layers.tracing import can_be_leaf, is_scripting, leaf_call

Geometry = tuple[float, float, int, float, float, float]
# What a TokenPattern takes, by dimensions.
KINDS = {3: "tokens (B, T, C)", 4: "attention weights (B, heads, queries, keys)"}
# A network has a few dozen places, each with a map or two.
MOST_STENCILS = 256
_stencils: dict[tuple[int, int, Geometry, torch.device], tuple[Tensor, Tensor]] = {}


class PatternDropout(nn.Module):
    """Dropout of a `ConvPattern` or a `TokenPattern` (AutoDropout, arXiv 2101.01761).

    In training mode each call draws a mask `m`, with a new placement for each sample, and returns
    `x * m * numel(m) / max(sum(m), 1)`. Both counts are over the whole tensor, so its mean is kept. Under DDP this is
    the local batch. In evaluation mode the layer returns its input itself. A pattern of size 0 returns the input itself
    in training mode too, and draws no random number.

    The layer adds nothing to the `state_dict`. Masks come from torch's random stream, on the device of the input.

    A ConvPattern takes maps (B, C, H, W) of any size, and makes what depends on the size once. A TokenPattern takes
    tokens (B, T, C), or attention weights (B, heads, queries, keys): tokens are keys there, channels are heads, and
    each query draws its own noise.

    torch.fx traces the layer as one call, as it does nn.Dropout. torch.jit.script compiles it with the pattern and
    progress of that moment; a scripted ConvPattern makes its stencil in each call.

    Args:
        pattern: The pattern.
        shared_masks: Place and draw it once for all samples of a batch, instead of for each. There is no padding mask
            then.

    Raises:
        ConfigurationError: If it is no pattern.

    Example:
        >>> layer = PatternDropout(ConvPattern(size=0.5, share_c=True))
        >>> (layer(torch.ones(2, 8, 4, 4)) == 0).sum((1, 2, 3))
        tensor([32, 32])

    """

    # TorchScript would compile these properties, and cannot.
    __jit_unused_properties__ = ("pattern", "progress")

    def __init__(self, pattern: Pattern, shared_masks: bool = False) -> None:
        super().__init__()
        self.shared_masks = check_flag("PatternDropout", "shared_masks", shared_masks)
        _register_operator()
        if not isinstance(pattern, (ConvPattern, TokenPattern)):
            raise ConfigurationError(
                f"PatternDropout(pattern={describe(pattern)}) was given.",
                "A pattern is a ConvPattern or a TokenPattern.",
                "Pass, for example, pattern=ConvPattern(size=0.25).",
            )
        self._patterns = (pattern,)
        self._is_empty, self._rate, self._share_c = pattern.is_empty, pattern.rate, pattern.share_c
        # TorchScript reads numbers, not patterns.
        self._of_tokens = isinstance(pattern, TokenPattern)
        self._geometry: Geometry = (0.0, 1.0, 1, 0.0, 0.0, 0.0)
        self._run, self._gap, self._share_t = 0, 1, False
        if isinstance(pattern, ConvPattern):
            turned = (pattern.rotate, pattern.shear_x, pattern.shear_y)
            self._geometry = (pattern.size, pattern.stride, pattern.repeat, *turned)
        else:
            self._run = WHOLE if pattern.size == "all" else pattern.size
            self._gap, self._share_t = pattern.stride, pattern.share_t
        self._text = " ".join(map(repr, (*self._geometry, pattern.rate)))
        self._place, self._takes_tokens, self._takes_weights = "", True, True
        self._progress = 1.0
        self._set_applied_progress(torch.device("cpu"))

    def stand_at(self, place: str, of_attention: bool) -> None:
        """Tell the layer where it stands: errors name the place, and what else comes there is refused.

        Args:
            place: The place, in words.
            of_attention: Whether a TokenPattern gets attention weights there, and no tokens.

        """
        self._place, self._takes_tokens, self._takes_weights = f" of {place}", not of_attention, of_attention

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be read from a file, perhaps in a process that has made no such layer."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _register_operator()

    @property
    def pattern(self) -> Pattern:
        """The pattern. It cannot be changed: make another layer."""
        return self._patterns[0]

    @property
    def progress(self) -> float:
        """How far the warm-up of the pattern's `rate` is: at 0 nothing is dropped, at 1 the rate is the pattern's.

        Set it in each step for a warm-up. The device is not waited for, and compiled code is not compiled again.
        """
        return self._progress

    @progress.setter
    def progress(self, progress: float) -> None:
        self._progress = float(check_fraction("PatternDropout", "progress", progress, example=1.0))
        self._applied_progress.fill_(self._progress)  # in place, because compiled code keeps reading the same tensor

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Drop the pattern from `x` in training mode. In evaluation mode return `x` itself.

        Args:
            x: Maps (B, C, H, W), tokens (B, T, C), or attention weights (B, heads, queries, keys).
            padding_mask: For a TokenPattern: True for tokens that are padding, shape (B, T), as torch's attention takes
                it. Runs are counted from the first other token. Padding is kept, and left out of the counts.

        Returns:
            Shape, dtype and device of `x`.

        Raises:
            ConfigurationError: In training mode, if `x` has other dimensions, or the pattern would drop all of it.

        """
        # TorchScript does not compile what is under this condition, if it stands alone.
        if not is_scripting():  # noqa: SIM102
            if isinstance(x, Proxy) and can_be_leaf(self, PatternDropout.forward, x):
                return leaf_call(self, x) if padding_mask is None else leaf_call(self, x, padding_mask)
        if not self.training or self._is_empty:
            return x
        if not is_scripting():
            self._check_input(x, padding_mask)
        if self.shared_masks:
            return x * self._drop(x.new_ones(x[:1].shape), None)
        return self._drop(x, padding_mask)

    def _drop(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        rate = self._applied_progress * self._rate
        if self._of_tokens:
            return token_dropout(x, self._run, self._gap, rate, self._share_t, self._share_c, padding_mask)
        size, stride, repeat, rotate, shear_x, shear_y = self._geometry
        height, width = x.shape[2], x.shape[3]
        if is_scripting():
            canvas, places = make_stencil(height, width, size, stride, repeat, rotate, shear_x, shear_y)
            canvas, places = canvas.to(x.device), places.to(x.device)
        else:
            canvas, places = self._stencil(x)
        return stencil_dropout(x, canvas, places, rate, self._share_c)

    def extra_repr(self) -> str:
        """Show the pattern."""
        return f"{self.pattern}{', shared_masks=True' if self.shared_masks else ''}"

    @torch.jit.unused
    def _check_input(self, x: Tensor, padding_mask: Tensor | None) -> None:
        """Refuse an input that the pattern does not fit.

        Raises:
            ConfigurationError: If it does not.

        """
        if not self._of_tokens and (x.ndim != 4 or padding_mask is not None):
            padded = "" if padding_mask is None else f" and padding_mask={describe(padding_mask)}"
            raise ConfigurationError(
                f"A PatternDropout with a ConvPattern{self._place} was called with {describe(x)}{padded}.",
                "A ConvPattern takes feature maps (B, C, H, W), and no padding mask.",
                "Leave this place without a pattern."
                if self._place
                else "Place the layer after a convolution or its normalisation, or use a TokenPattern for (B, T, C).",
            )
        takes = {3: self._takes_tokens, 4: self._takes_weights}
        if self._of_tokens and not takes.get(x.ndim, False):
            kinds = [kind for dims, kind in KINDS.items() if takes[dims]]
            raise ConfigurationError(
                f"A PatternDropout with a TokenPattern{self._place} was called with {describe(x)}.",
                f"A TokenPattern takes {' or '.join(kinds)}{' there' if self._place else ''}.",
                "Leave this place without a pattern."
                if self._place
                else "Place the layer where the batch is the first dimension, or use a ConvPattern for maps.",
            )
        if padding_mask is not None and self.shared_masks:
            raise ConfigurationError(
                "A PatternDropout(shared_masks=True) was called with a padding mask.",
                "Samples with padding of their own have masks of their own.",
                "Leave shared_masks or the padding mask out.",
            )
        if padding_mask is not None:
            fitting = (x.shape[0], x.shape[3 if x.ndim == 4 else 1])
            if padding_mask.dtype != torch.bool or tuple(padding_mask.shape) != fitting:
                raise ConfigurationError(
                    f"A PatternDropout was called with {describe(x)} and padding_mask={describe(padding_mask)}.",
                    f"For this input a padding mask has the shape {fitting} and the dtype torch.bool.",
                    "Pass True for tokens that are padding and False for others.",
                )

    @torch.jit.unused
    def _stencil(self, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2], x.shape[3]
        if torch.compiler.is_compiling():
            canvas, places = torch.ops.lightning_ydrop.stencil(self._text, height, width, x.device)
            return canvas, places
        return _stencil(height, width, self._geometry, self._rate, x.device, self._place)

    def _set_applied_progress(self, device: torch.device) -> None:
        # A plain tensor, no buffer: DDP would send it at every step, and averages of weights would hold it.
        with torch.inference_mode(False):  # training cannot update a tensor that was made in inference mode
            self._applied_progress = torch.full((), self._progress, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PatternDropout":
        """Follow the model to its device but not to its dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(self._applied_progress).device
        if device != self._applied_progress.device:
            self._set_applied_progress(device)
        return self


def _stencil(
    height: int, width: int, geometry: Geometry, rate: float, device: torch.device, place: str = ""
) -> tuple[Tensor, Tensor]:
    """Give the stencil of a pattern for maps of one size, made once for each device.

    Raises:
        ConfigurationError: If the pattern covers such a map, and its rate is 1.

    """
    key = (height, width, geometry, device)
    found = _stencils.get(key)
    if found is None:
        with torch.inference_mode(False):
            canvas, places = make_stencil(height, width, *geometry)
            found = canvas.to(device, non_blocking=True), places.to(device, non_blocking=True)
        if type(found[0]) is Tensor:  # a fake tensor would outlive the mode that made it
            if len(_stencils) >= MOST_STENCILS:
                _stencils.pop(next(iter(_stencils)), None)
            _stencils[key] = found
    if rate == 1.0 and found[0].shape == COVERING:
        raise ConfigurationError(
            f"ConvPattern(size={geometry[0]}, rate=1.0){place} was applied to maps of {height} x {width}.",
            "Rounded to whole pixels, the pattern covers such a map, and at rate 1 nothing would be left.",
            "Pass a smaller size or a rate below 1, or leave this place without a pattern.",
        )
    return found


def _stencil_in_graph(pattern: str, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    canvas, places = _stencil(height, width, *_read(pattern), device)
    return canvas.clone(), places.clone()  # what an operator returns is written to by the graph, once it is used


def _stencil_of_shapes(pattern: str, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    canvas, places = _stencil(height, width, *_read(pattern), torch.device("meta"))
    # Not `empty_like`: kept from an earlier call on the meta device, the two are no fake tensors.
    shapes = ((each.shape, each.dtype) for each in (canvas, places))
    canvas, places = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes)
    return canvas, places


@cache
def _register_operator() -> None:
    """Register the operator with which compiled code looks a stencil up.

    As constants of a graph, the stencils of two layers would have one name. The pattern is a text, since a compiler may
    take the numbers of two layers for one variable. The first layer registers it: that takes as long as the import of
    this package.
    """
    schema = "(str pattern, int height, int width, Device device) -> (Tensor, Tensor)"
    operator = torch.library.custom_op("lightning_ydrop::stencil", _stencil_in_graph, mutates_args=(), schema=schema)
    operator.register_fake(_stencil_of_shapes)


def _read(pattern: str) -> tuple[Geometry, float]:
    size, stride, repeat, rotate, shear_x, shear_y, rate = map(float, pattern.split())
    return (size, stride, int(repeat), rotate, shear_x, shear_y), rate
