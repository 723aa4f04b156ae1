"""Tensors that a pass may write to, and how their values, memory and flags are put back."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.torch_internals import PLAIN_TENSORS, is_untouched


class KeptTensor:
    """A tensor, with what puts it back.

    Args:
        tensor: A plain one.
        shared: A copy that shares its memory until one of the two is written to, or None to copy it now.

    """

    __slots__ = ("alias", "copied", "grad_fn", "requires_grad", "shares", "tensor", "version")

    def __init__(self, tensor: Tensor, shared: Tensor | None) -> None:
        self.tensor = tensor
        # It keeps hold of the memory: `tensor.data = other` gives a tensor another's, and `copy_` would write there.
        self.alias = tensor.data
        self.shares = shared is not None
        self.copied: Tensor | None = tensor.detach().clone() if shared is None else shared
        self.version = version_of(tensor)
        self.requires_grad, self.grad_fn = tensor.requires_grad, tensor.grad_fn

    def put_back(self, may_compare: bool) -> bool | None:
        """Let the tensor be as it was.

        Args:
            may_compare: Whether to look at values, for which a GPU has to catch up.

        Returns:
            Whether something is known to have written to it: None where only its memory was asked for.

        """
        tensor, copied = self.tensor, self.copied
        assert copied is not None
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            is_moved = not _is_same_place(tensor, self.alias)
            if is_moved:
                tensor.data = self.alias
            self._put_back_graph()
            is_written = is_moved or self.version != version_of(tensor)
            if self.shares and is_untouched(self.alias):
                return is_written
            # Where a version has not moved, `.data` may have been written to.
            if not is_written and may_compare:
                if same_bits(tensor, copied):
                    return None if self.shares else False
                is_written = True
            if tensor.layout == torch.strided:
                self._make_room()
                self.alias.copy_(copied)  # past the version counter
            elif is_written:
                tensor.data = copied
            return is_written or self.shares

    def release(self) -> None:
        """Let go of the copy, once those of all tensors over one memory are put back: `unshare` comes after."""
        self.copied = None

    def unshare(self) -> None:
        """Take the memory back, without a copy: torch loses shared memory where `resize_` is called."""
        if self.shares:
            self.alias.data_ptr()

    def _put_back_graph(self) -> None:
        tensor = self.tensor
        if tensor.grad_fn is not self.grad_fn and self.grad_fn is None:
            tensor.detach_()
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)

    def _make_room(self) -> None:
        storage = self.alias.untyped_storage()
        if self.copied is not None and storage.nbytes() < self.copied.untyped_storage().nbytes():
            storage.resize_(self.copied.untyped_storage().nbytes())


def is_plain(value: object) -> bool:
    """Tell whether a tensor is no more than memory and a shape."""
    return type(value) in PLAIN_TENSORS


def version_of(tensor: Tensor) -> int:
    """Count the writes to a tensor: -1 where torch does not."""
    return -1 if tensor.is_inference() else tensor._version


def replace_inference_tensors(registry: dict[str, Any], copies: dict[int, Tensor]) -> None:
    """Let a registry hold copies of tensors made in inference mode, as `eval()` makes them in a validation.

    Torch takes no gradients through an operation that keeps one.

    Args:
        registry: By name, what a module holds.
        copies: By the id of the tensor, the copies so far. New ones are added.

    """
    for name, value in registry.items():
        if isinstance(value, Tensor) and is_plain(value) and value.is_inference():
            if id(value) not in copies:
                with torch.inference_mode(False):
                    copied = value.clone()
                    copies[id(value)] = nn.Parameter(copied, False) if isinstance(value, nn.Parameter) else copied
            registry[name] = copies[id(value)]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare values, as far as torch can: NaN differs from itself, and few layouts can be compared at all."""
    one, other = one.detach(), other.detach()
    if not (_is_dense(one) and _is_dense(other)):
        return True
    return torch.equal(one, other) or (
        torch.equal(one != one, other != other) and torch.equal(one[one == one], other[other == other])
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def _is_same_place(tensor: Tensor, alias: Tensor) -> bool:
    if (tensor.dtype, tensor.device, tensor.layout) != (alias.dtype, alias.device, alias.layout):
        return False
    return not _is_dense(tensor) or tensor.is_set_to(alias)
