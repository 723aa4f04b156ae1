"""The random streams of Python and NumPy, and how they are given back."""

import _random
import ctypes
import pickle
import random
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# Both are a Mersenne Twister: 624 numbers, and how many of them are drawn.
SIZE = 625 * 4
_PYTHONS, _NUMPYS = struct.Struct("=i624I"), struct.Struct("=624Ii")
_PAIR = struct.Struct("=i4xd")  # of normal numbers, of which NumPy keeps the second: whether it waits, and the number
_PYTHON: Any = random.getstate.__self__  # type: ignore[attr-defined] # the object whose methods the functions are


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Give the random streams of Python and NumPy back as they were.

    To ask both for their states and compare them takes a tenth of a small network's phase 1, so that a step could not
    do it. To look at the memory where they lie takes a microsecond.
    """
    of_python, of_numpy = python_state(), numpy_state()
    try:
        yield
    finally:
        if python_state() != of_python:
            set_python_state(of_python)
        if of_numpy is not None and numpy_state() != of_numpy:
            set_numpy_state(of_numpy)


@contextmanager
def random_streams_from_torch() -> Iterator[None]:
    """Let Python and NumPy draw what follows from torch's random stream, so that its seed alone decides.

    Torch's stream moves on if one of the two does, so that the next draws are others.
    """
    copied = torch.Generator()
    copied.set_state(torch.get_rng_state())
    seed = int(torch.randint(2**32, (), generator=copied, device="cpu"))
    random.seed(seed)
    if (stream := _numpys_stream()) is not None:
        stream.seed(seed)
    before = python_state(), numpy_state()
    yield
    if (python_state(), numpy_state()) != before:
        torch.rand((), device="cpu")


def python_state() -> Any:
    """Give the state of Python's random stream, to compare and to put back."""
    if _reads_python():
        return ctypes.string_at(id(_PYTHON) + object.__basicsize__, SIZE), _PYTHON.gauss_next
    return random.getstate()


def set_python_state(state: Any) -> None:
    """Put back what `python_state` gave."""
    if _reads_python():
        memory, gauss = state
        drawn, *numbers = _PYTHONS.unpack(memory)
        state = (random.Random.VERSION, (*numbers, drawn), gauss)
    random.setstate(state)


def numpy_state() -> Any:
    """Give the state of NumPy's random stream, to compare and to put back: None where nobody has imported it."""
    stream = _numpys_stream()
    if stream is None:
        return None
    place = _place_of_pair(type(stream))  # type: ignore[arg-type] # mypy sees no hash in classes
    if place is None or type(stream._bit_generator).__name__ != "MT19937":
        return pickle.dumps(stream.get_state(legacy=False))
    memory = ctypes.string_at(stream._bit_generator.ctypes.state_address, SIZE)
    return memory, ctypes.string_at(id(stream) + place, _PAIR.size)


def set_numpy_state(state: Any) -> None:
    """Put back what `numpy_state` gave."""
    stream: Any = _numpys_stream()
    if isinstance(state, bytes):
        stream.set_state(pickle.loads(state))
    else:
        *numbers, drawn = _NUMPYS.unpack(state[0])
        stream.set_state(("MT19937", numbers, drawn, *_PAIR.unpack(state[1])))


def _numpys_stream() -> Any:
    numpy: Any = sys.modules.get("numpy.random")
    return None if numpy is None else getattr(numpy.get_state, "__self__", None)


@cache
def _reads_python() -> bool:
    """Tell whether the state lies where CPython puts it, by a stream of our own."""
    stream = random.Random(1)
    stream.random()
    if sys.implementation.name != "cpython" or _random.Random.__basicsize__ < object.__basicsize__ + SIZE:
        return False
    drawn, *numbers = _PYTHONS.unpack(ctypes.string_at(id(stream) + object.__basicsize__, SIZE))
    return bool(stream.getstate()[1] == (*numbers, drawn))


@cache
def _place_of_pair(cls: Any) -> int | None:
    """Find where NumPy keeps the second of a pair, by a stream of our own, or None where it lies elsewhere."""
    try:
        stream, number = cls(1), 1.25e-9
        _, numbers, drawn, *_ = stream.get_state()
        stream.set_state(("MT19937", numbers, drawn, 1, number))
        place = ctypes.string_at(id(stream), cls.__basicsize__).find(_PAIR.pack(1, number)[8:]) - 8
        memory = ctypes.string_at(stream._bit_generator.ctypes.state_address, SIZE)
        is_there = place >= 0 and _PAIR.unpack(ctypes.string_at(id(stream) + place, _PAIR.size)) == (1, number)
        return place if is_there and _NUMPYS.unpack(memory) == (*numbers.tolist(), drawn) else None
    except Exception:
        return None
