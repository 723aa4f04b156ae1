"""What a network contains: dropout layers that stand where torch's own stood."""

from lightning_ydrop.layers.conductance_dropout import ConductanceDropout

__all__ = ["ConductanceDropout"]
