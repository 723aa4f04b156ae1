"""What a network contains: dropout layers that stand where torch's own stood."""

from lightning_ydrop.layers.conductance_dropout import ConductanceDropout
from lightning_ydrop.layers.conversion import ConversionReport, convert_dropout, restore_dropout

__all__ = ["ConductanceDropout", "ConversionReport", "convert_dropout", "restore_dropout"]
