"""What a network contains: dropout layers that stand where torch's own stood."""

from lightning_ydrop.layers.conductance_dropout import ConductanceDropout
from lightning_ydrop.layers.conversion import ConversionReport, convert_dropout, restore_dropout
from lightning_ydrop.layers.jumpout import Jumpout
from lightning_ydrop.layers.pattern_dropout import PatternDropout
from lightning_ydrop.layers.patterns import ConvPattern, TokenPattern

__all__ = [
    "ConductanceDropout",
    "ConvPattern",
    "ConversionReport",
    "Jumpout",
    "PatternDropout",
    "TokenPattern",
    "convert_dropout",
    "restore_dropout",
]
