"""The mathematics of the methods: tensors in, tensors out, no state and no modules."""

from lightning_ydrop.functional.masking import jumpout

__all__ = ["jumpout"]
