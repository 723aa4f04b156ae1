"""Tensors that a pass may write to, and how their values, memory and flags are put back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.observations import Observations, Place
from lightning_ydrop.models.sharing import may_be_shared, note_lost_memory
from lightning_ydrop.torch_internals import PLAIN_TENSORS, copy_on_write, is_lost, is_untouched, memory_of

# Larger tensors that can't be shared with a copy are watched, until a pass is seen to write to them.
MOST_ELEMENTS = 1000


class KeptTensor:
    """A tensor, with what puts it back.

    Args:
        tensor: A plain one.
        shared: A copy that shares its memory until one of the two is written to, or None to copy it now.
        place: Where it lies inside something else, or None.

    """

    __slots__ = ("alias", "copied", "grad_fn", "is_lost", "place", "requires_grad", "shares", "tensor", "version")

    def __init__(self, tensor: Tensor, shared: Tensor | None, place: Place | None = None) -> None:
        self.tensor = tensor
        # It keeps hold of the memory: `tensor.data = other` gives a tensor another's, and `copy_` would write there.
        self.alias = tensor.data
        self.shares = shared is not None
        self.copied: Tensor | None = tensor.detach().clone() if shared is None else shared
        self.place = place
        self.version = version_of(tensor)
        self.requires_grad, self.grad_fn = tensor.requires_grad, tensor.grad_fn
        self.is_lost = False

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
            if is_lost(self.alias):
                self.is_lost = True
                return True
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

    def move(self, memories: dict[int, torch.UntypedStorage]) -> None:
        """Give a tensor whose memory is lost that of its copy: by the name of the lost memory, for all views of it."""
        assert self.copied is not None
        self.copied.data_ptr()
        memory = memories.setdefault(memory_of(self.alias), self.copied.untyped_storage())
        alias = self.alias.new_empty(0)
        alias.set_(memory, self.alias.storage_offset(), self.alias.shape, self.alias.stride())
        self.alias = self.tensor.data = alias

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


class Tensors:
    """The tensors that a pass may write to, taken before it and put back after it.

    Args:
        observations: What earlier passes have written to, to be added to. None guards everything.
        learning: Whether to guard everything all the same.

    """

    def __init__(self, observations: Observations | None, learning: bool) -> None:
        self._observations = observations
        self._learning = learning or observations is None
        self.written: set[int] = set() if observations is None else observations.written
        self.seen: set[int] = set()  # whatever a snapshot has taken, by id
        self._kept: list[KeptTensor] = []
        self.watched: list[tuple[Tensor, int, Place | None]] = []

    def take(self, tensor: Tensor, place: Place | None = None) -> None:
        """Guard a tensor: share its memory with a copy, or copy it if a pass was seen to write to it."""
        if not is_plain(tensor):
            return
        observations, is_written = self._observations, id(tensor) in self.written
        may_share, must_guard = may_be_shared(tensor), self._learning or is_written
        if observations is not None and not self._learning:
            # To share what will be written to takes as long as to copy it, and moves it to other memory.
            may_share = may_share and not is_written and id(tensor) not in observations.read_raw
        copied = copy_on_write(tensor) if may_share else None
        if copied is None and not must_guard and tensor.numel() > MOST_ELEMENTS and not tensor.is_inference():
            self.watched.append((tensor, tensor._version, place))
        else:
            self._kept.append(KeptTensor(tensor, copied, place))

    def take_inside(self, tensor: Tensor, place: Place) -> None:
        """Guard a tensor of many that something may hold, if tensors there were written to, and else watch it."""
        observations = self._observations
        if observations is None or self._learning or id(tensor) in self.written or place in observations.rewritten:
            self.take(tensor, place)
        elif is_plain(tensor) and not tensor.is_inference():
            self.watched.append((tensor, tensor._version, place))

    def put_back(self, name_of: Callable[[Tensor], str]) -> None:
        """Let all of them be as they were, and remember which were written to.

        Args:
            name_of: Names a tensor for the user.

        """
        observations, memories = self._observations, dict[int, torch.UntypedStorage]()
        for kept in self._kept:
            is_written = kept.put_back(may_compare=self._learning)
            if is_written:
                self._note(kept.tensor, kept.place)
            elif is_written is None and observations is not None:
                observations.read_raw.add(id(kept.tensor))
        lost = [kept for kept in self._kept if kept.is_lost]
        for kept in sorted(lost, key=lambda each: not each.shares):  # those that share hold all of a memory
            kept.move(memories)
        if memories:
            note_lost_memory()
        for kept in self._kept:
            kept.release()
        for kept in self._kept:
            kept.unshare()
        for tensor, version, place in self.watched:
            if tensor._version != version and observations is not None:
                self._note(tensor, place)
                observations.unguarded.append(name_of(tensor))
        if observations is not None and len(self.written) > len(self.seen) + MOST_ELEMENTS:
            self.written.intersection_update(self.seen)  # of tensors that are no more

    def _note(self, tensor: Tensor, place: Place | None) -> None:
        self.written.add(id(tensor))
        if place is not None and self._observations is not None:
            self._observations.rewritten.add(place)


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
