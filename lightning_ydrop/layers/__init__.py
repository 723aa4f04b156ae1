"""What a network contains: dropout layers that stand where torch's own stood."""

from lightning_ydrop.layers.conductance_dropout import ConductanceDropout
from lightning_ydrop.layers.conversion import ConversionReport, convert_dropout, restore_dropout
from lightning_ydrop.layers.jumpout import Jumpout

__all__ = ["ConductanceDropout", "ConversionReport", "Jumpout", "convert_dropout", "restore_dropout"]
