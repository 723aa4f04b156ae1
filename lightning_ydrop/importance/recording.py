"""Borrowing a model for phase 1, and recording what its layers put out."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.observations import Observations
from lightning_ydrop.models.state import leaving_no_trace, random_stream_kept
from lightning_ydrop.torch_internals import same_memory


class Tape(dict[str, list[Tensor]]):
    """For each layer that ran, by name, its outputs, one for each time that it was called."""

    def __init__(self) -> None:
        super().__init__()
        # By name, each tensor that shares memory with an output, and its version when it was recorded.
        self._shared: list[tuple[str, Tensor, int]] = []
        self._is_closed = False

    def record(self, name: str, activation: Tensor, shared: Sequence[Tensor] = ()) -> None:
        """Add an output of a layer, and watch the tensors that share its memory."""
        if self._is_closed:
            return
        self.setdefault(name, []).append(activation)
        self._shared += [(name, tensor, tensor._version) for tensor in shared]

    @property
    def overwritten(self) -> set[str]:
        """Name the layers whose recorded outputs the network has written over since."""
        return {name for name, tensor, version in self._shared if tensor._version != version}

    def clear(self) -> None:
        """Make ready for another forward pass."""
        super().clear()
        self._shared.clear()
        self._is_closed = False

    def close(self) -> None:
        """Let go of everything, and record nothing in the backward pass: activation checkpoints call layers again."""
        self.clear()
        self._is_closed = True


@contextmanager
def borrowed(
    model: nn.Module,
    device: torch.device,
    *,
    constant_parameters: bool = False,
    beside: Sequence[object] = (),
    observations: Observations | None = None,
    learning: bool = False,
    evaluate: bool = True,
) -> Iterator[None]:
    """Put a model in the state in which its units are measured, and undo that at the end.

    Inside, every module is in the state that `eval()` gives (dropout off, BatchNorm on its running statistics),
    gradients are recorded whatever the caller has set, compiled parts run eagerly (a recorded activation cannot be
    differentiated through a compiled graph), and nothing that passes change stays: see `leaving_no_trace`.

    Args:
        model: Any model.
        device: Where it runs; the random stream of this device is given back.
        constant_parameters: Whether to record no gradients for parameters. Then nothing is kept for them, and the
            network before the first recorded layer keeps nothing at all.
        beside: Whatever else the passes run or may change.
        observations: What earlier passes were seen to change. None guards everything.
        learning: Whether these passes are observed.
        evaluate: Whether modules are put in evaluation mode.

    """
    roots = (model, *(each for each in beside if each is not model))
    with ExitStack() as stack:
        stack.enter_context(random_stream_kept(device))
        modules = stack.enter_context(leaving_no_trace(roots, observations, learning=learning, evaluate=evaluate))
        if constant_parameters:
            stack.enter_context(_constant_parameters(modules))
        if device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in modules):
            # Which cannot differentiate them in evaluation mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on, after torch.no_grad() too
        yield


@contextmanager
def recording(layers: Mapping[str, nn.Module], copied: Set[str] | None = None) -> Iterator[Tape]:
    """Keep what the layers put out, in a form that gradients can be taken with respect to.

    Args:
        layers: The modules to listen to, by name.
        copied: Names of layers whose outputs are copied, so that in-place operations do not write over the record; it
            is looked at whenever a layer runs. `Tape.overwritten` names those that it should hold. None copies all.

    Yields:
        What they put out.

    Raises:
        ConfigurationError: If a layer puts out anything but one floating tensor.

    """
    tape = Tape()
    copied = layers.keys() if copied is None else copied
    handles = [layer.register_forward_hook(_recorder(name, tape, copied)) for name, layer in layers.items()]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _recorder(name: str, tape: Tape, copied: Set[str]) -> Callable[[nn.Module, Any, Any], Tensor]:
    def record(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            raise ConfigurationError(
                f"The layer {name!r} ({type(module).__name__}) put out {describe(output)}.",
                "Conductance is measured at layers that put out one floating tensor.",
                "Choose a layer inside or after this one that does.",
            )
        if output.is_inference():
            # Autograd sees nothing that depends on it, so its conductance is 0.
            with torch.inference_mode(False):
                tape.record(name, output.clone().requires_grad_())
            return output
        if name in copied:
            output = output.clone()
        if output.requires_grad:
            # A node of its own, after the layer. A dropout in evaluation mode returns its input itself, which other
            # parts of the network may use too. What passes through those parts is not the layer's.
            activation = output if name in copied else same_memory(output)
            tape.record(name, activation, shared=() if name in copied else (output, activation))
            return activation.clone() if name in copied else activation
        # No gradient is recorded for the output of a frozen part of the network: start recording here.
        activation = output.detach().requires_grad_()
        # The network goes on with another tensor, because it may not write to a leaf in place.
        passed_on = activation.clone() if name in copied else same_memory(activation)
        tape.record(name, activation, shared=() if name in copied else (activation, passed_on))
        return passed_on

    return record


@contextmanager
def _constant_parameters(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let no gradient be recorded for parameters of torch's own class.

    Others are left alone: FSDP2 puts what it gathers in the place of its DTensors while the model runs.
    """
    parameters = [
        parameter
        for module in modules
        for parameter in module._parameters.values()
        if type(parameter) is nn.Parameter and parameter.requires_grad
    ]
    try:
        for parameter in parameters:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
