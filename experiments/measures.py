"""Measures of importance that only experiments take."""

from torch import Tensor

from lightning_ydrop import CaptumMeasure, Measure, Request


class ActivationMagnitude(Measure):
    """How large a unit's activation is, whatever its sign: importance without any gradient."""

    def score(self, request: Request) -> dict[str, Tensor]:
        """Take the absolute activations (N, U) of each layer."""
        activations = CaptumMeasure("LayerActivation").score(request)
        return {name: values.abs() for name, values in activations.items()}
