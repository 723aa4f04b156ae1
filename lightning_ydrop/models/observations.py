"""What passes through a model were seen to change."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Observations:
    """What an engine has seen passes through its model change, so that later passes guard that alone.

    Attributes:
        written: Tensors, arrays and containers, by id, that a pass has written to.
        read_raw: Tensors, by id, whose memory something asked for that did not write: to share it would cost a copy.
        parameters: Whether a pass changes gradients, flags or attributes of parameters.
        inference: Whether a model has tensors that were made in inference mode.
        python_random: Whether a pass draws from Python's random stream.
        numpy_random: Whether a pass draws from NumPy's.
        tensor_hooks: Whether a pass registers hooks on tensors.
        changeable: The containers and arrays among them.
        unguarded: Descriptions of tensors that a later pass was the first to write to.

    """

    written: set[int] = field(default_factory=set)
    read_raw: set[int] = field(default_factory=set)
    parameters: bool = False
    inference: bool = False
    python_random: bool = False
    numpy_random: bool = False
    tensor_hooks: bool = False
    changeable: dict[int, Any] = field(default_factory=dict)
    unguarded: list[str] = field(default_factory=list)
