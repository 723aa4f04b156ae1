"""What passes through a model were seen to change."""

from dataclasses import dataclass, field

# The class of a module, or of another object that a pass starts from, and the name of its attribute. Objects come and
# go: a training step may make a list anew that the next pass fills. Where they lie stays.
Place = tuple[type, str]


@dataclass
class Observations:
    """What an engine has seen passes through its model change, so that later passes guard that alone.

    It holds no object of the model, and keeps none alive.

    Attributes:
        written: Tensors, by id, that a pass has written to.
        read_raw: Tensors, by id, whose memory something asked for that did not write: to share it would cost a copy.
        changing: Places where a pass has changed something: a container, an object, a class, or an array.
        rewritten: Places where a pass has written to a tensor inside something else.
        parameters: Whether a pass changes gradients, flags or attributes of parameters.
        inference: Whether a model has tensors that were made in inference mode.
        tensor_hooks: Whether a pass registers hooks on tensors.
        searches_cut_short: How many searches of a later pass ended before they had seen all that a model holds.
        unguarded: Descriptions of what a later pass was the first to change, where that may not have been undone.

    """

    written: set[int] = field(default_factory=set)
    read_raw: set[int] = field(default_factory=set)
    changing: set[Place] = field(default_factory=set)
    rewritten: set[Place] = field(default_factory=set)
    parameters: bool = False
    inference: bool = False
    tensor_hooks: bool = False
    searches_cut_short: int = 0
    unguarded: list[str] = field(default_factory=list)
