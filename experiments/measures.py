"""Measures of importance beside conductance, by names that a grid can vary."""

from torch import Tensor

from lightning_ydrop import CaptumMeasure, Request


class InternalInfluence(CaptumMeasure):
    """The gradient by the activation, averaged over the path (Leino et al., arXiv 1802.03788)."""

    def __init__(self) -> None:
        super().__init__("InternalInfluence")


class GradientTimesActivation(CaptumMeasure):
    """The gradient by the activation, times the activation.

    Grad-CAM (Selvaraju et al., arXiv 1610.02391) is the same where a layer has no positions.
    """

    def __init__(self) -> None:
        super().__init__("LayerGradientXActivation")


class DeepLift(CaptumMeasure):
    """DeepLift with the rescale rule (Shrikumar et al., arXiv 1704.02685)."""

    def __init__(self) -> None:
        super().__init__("LayerDeepLift")


class ActivationMagnitude(CaptumMeasure):
    """How large a unit's activation is, whatever its sign: importance without any gradient."""

    def __init__(self) -> None:
        super().__init__("LayerActivation")

    def score(self, request: Request) -> dict[str, Tensor]:
        """Take the absolute activations (N, U) of each layer."""
        return {name: values.abs() for name, values in super().score(request).items()}
