"""The Lightning face: hooks of a few lines over what stands below."""

from lightning_ydrop.callbacks.ydrop import YDropCallback

__all__ = ["YDropCallback"]
