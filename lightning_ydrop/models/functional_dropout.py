"""Dropout that is no layer: calls of torch's functions in a forward, seen and switched.

Functions such as `F.dropout` have no module that could be found in a model. A mode of torch sees each call of them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

TORCH = str(Path(torch.__file__).parent)
OURS = str(Path(__file__).parents[1])
# Between a caller and the mode there are these files of torch.
BETWEEN = tuple(f"{TORCH}/{each}" for each in ("overrides.py", "nn/functional.py", "_jit_internal.py"))
# Their calls are those of a layer, which is found as a module.
OF_LAYERS = (f"{TORCH}/nn/modules/dropout.py", f"{TORCH}/nn/modules/activation.py", f"{TORCH}/nn/modules/rnn.py", OURS)
# Where a module keeps the rate of an attention that gets 0 in evaluation mode.
NAMES_OF_RATES = (
    *("attn_drop", "attn_dropout", "attention_dropout", "att_drop", "att_dropout", "attn_dropout_p", "attn_drop_prob"),
    *("attention_dropout_prob", "attention_probs_dropout_prob", "dropout_p", "dropout", "drop", "p_drop", "p_dropout"),
    *("dropout_rate", "dropout_prob", "drop_rate", "drop_prob"),
)


class _Argument(NamedTuple):
    """An argument of a function: its place among the positional ones, its name, and its default."""

    place: int
    name: str
    default: Any


class _Signature(NamedTuple):
    """Where a function takes its rate, and the flag that turns dropout on. Attention may have no flag."""

    rate: _Argument
    flag: _Argument | None


def _signatures() -> dict[Any, _Signature]:
    rate = _Argument(1, "p", 0.5)
    layers = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
    plain = {
        each: _Signature(rate, _Argument(2, "training", each not in (F.alpha_dropout, F.feature_alpha_dropout)))
        for each in layers
    }
    names = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
    functions = [getattr(torch, f"{name}{end}") for name in names for end in ("", "_")]
    native = dict.fromkeys([*functions, torch.native_dropout], _Signature(rate, _Argument(2, "train", True)))
    attention = {
        F.scaled_dot_product_attention: _Signature(_Argument(4, "dropout_p", 0.0), None),
        F.multi_head_attention_forward: _Signature(_Argument(10, "dropout_p", 0.0), _Argument(13, "training", True)),
    }
    recurrent = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
    signature = _Signature(_Argument(5, "dropout", 0.0), _Argument(6, "train", True))
    return {**plain, **native, **attention, **dict.fromkeys(recurrent, signature)}


SIGNATURES = _signatures()
RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
OF_FUNCTIONAL = {each for each in SIGNATURES if getattr(F, each.__name__, None) is each}


# The function, file and line of a call.
Place = tuple[str, str, int]
# The rates at which the calls of each place drop in one pass in training mode, in their order: 0 where they do not.
Rates = Mapping[Place, Sequence[float]]


class DropoutCall(NamedTuple):
    """A place in the code that drops without a layer.

    Attributes:
        function: The name of the function.
        rate: The rate at which it drops, or would in training mode. None where it is not known.
        file: The file of the call.
        line: Its line there.

    """

    function: str
    rate: float | None
    file: str
    line: int

    @property
    def place(self) -> Place:
        """Where it is in the code."""
        return self.function, self.file, self.line

    def __str__(self) -> str:
        rate = "" if self.rate is None else f"rate {self.rate:g}, "
        return f"{self.function} ({rate}{self.file}:{self.line})"


class _Call:
    """A call of one of the functions, and what made it."""

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], frame: FrameType | None) -> None:
        self.function = function
        self.signature = SIGNATURES[function]
        if function in RECURRENT and len(args) > 3 and isinstance(args[3], (list, tuple)):
            # Packed sequences have their lengths as one argument more.
            rate, flag = self.signature
            assert flag is not None
            self.signature = _Signature(rate._replace(place=6), flag._replace(place=7))
        self.args, self.kwargs = list(args), dict(kwargs)
        self.frame = frame

    @property
    def rate(self) -> float:
        """The rate: of an attention that has got 0, that which the module that calls it keeps."""
        given = float(self._get(self.signature.rate))
        return given if given > 0 or self.function != F.scaled_dot_product_attention else self._kept_rate()

    @property
    def rate_now(self) -> float:
        """The rate at which it drops as it is made."""
        is_on = self.signature.flag is None or self._get(self.signature.flag)
        return float(self._get(self.signature.rate)) if is_on else 0.0

    @property
    def is_of_layer(self) -> bool:
        """Whether a layer makes it, of torch or of this package."""
        return self.frame is not None and self.frame.f_code.co_filename.startswith(OF_LAYERS)

    def described(self) -> DropoutCall:
        """Say what it is and where."""
        name = self.function.__name__
        where = self.frame
        file = "unknown" if where is None else where.f_code.co_filename
        with suppress(ValueError):
            file = str(Path(file).relative_to(Path.cwd()))
        holder = "F" if self.function in OF_FUNCTIONAL else "torch"
        return DropoutCall(f"{holder}.{name}", self.rate or None, file, 0 if where is None else where.f_lineno)

    def switched(self, on: bool) -> Any:
        """Make the call with dropout on or off."""
        if self.signature.flag is not None:
            self._put(self.signature.flag, on)
        elif on:
            self._put(self.signature.rate, self.rate)
        else:
            self._put(self.signature.rate, 0.0)
        return self.function(*self.args, **self.kwargs)

    def dropping_at(self, rate: float) -> Any:
        """Make the call as in training mode: at its own rate, or if that is 0 in evaluation mode at another."""
        if not self._get(self.signature.rate):
            self._put(self.signature.rate, rate)
        return self.switched(True)

    def _kept_rate(self) -> float:
        """Find the rate in the module that makes the call, which may hand itself to a function."""
        if self.frame is None:
            return 0.0
        first = self.frame.f_code.co_varnames[:1]  # self, whatever it is called
        for module in (self.frame.f_locals.get(variable) for variable in (*first, "module")):
            for name in NAMES_OF_RATES if isinstance(module, nn.Module) else ():
                value = getattr(module, name, None)
                value = value.p if isinstance(value, nn.Dropout) else value
                if isinstance(value, float) and 0.0 < value < 1.0:
                    return value
        return 0.0

    def _get(self, argument: _Argument) -> Any:
        if len(self.args) > argument.place:
            return self.args[argument.place]
        return self.kwargs.get(argument.name, argument.default)

    def _put(self, argument: _Argument, value: Any) -> None:
        if len(self.args) > argument.place:
            self.args[argument.place] = value
        else:
            self.kwargs[argument.name] = value


class _Seeing(TorchFunctionMode):
    """Notes calls, or makes them with dropout on or off.

    Args:
        switch: Whether calls drop, or None to make them as they are.
        rates: With `switch`, those at which calls drop. Without them, all do.

    """

    def __init__(self, switch: bool | None, rates: Rates | None = None) -> None:
        super().__init__()
        self.switch, self.rates = switch, rates
        self.calls: dict[Place, DropoutCall] = {}
        self.rates_now: dict[Place, list[float]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in SIGNATURES:
            call = _Call(func, args, kwargs or {}, _caller())
            if not call.is_of_layer:
                said = call.described()
                if said.place not in self.calls or said.rate is not None:
                    self.calls[said.place] = said
                before = self.rates_now.setdefault(said.place, [])
                before.append(call.rate_now)
                if self.switch and self.rates is not None:
                    # Each pass makes as many calls at a place.
                    rates = self.rates.get(said.place, [0.0])
                    rate = rates[(len(before) - 1) % len(rates)]
                    return call.dropping_at(rate) if rate > 0 else func(*args, **(kwargs or {}))
                if self.switch is not None:
                    return call.switched(self.switch)
        return func(*args, **(kwargs or {}))


@contextmanager
def seeing_rates() -> Iterator[Rates]:
    """Note the rates at which calls of functional dropout that no layer makes drop, as they are made.

    Yields:
        The rates, filled while a model runs.

    """
    with torch.compiler.set_stance("force_eager"), _Seeing(None) as seeing:
        yield seeing.rates_now


@contextmanager
def seeing_dropout_calls() -> Iterator[dict[Place, DropoutCall]]:
    """Note the calls of functional dropout that no layer makes.

    In evaluation mode a forward may leave a call out, as under `if self.training`, or pass a rate of 0.

    Yields:
        The calls, each place once, filled while a model runs.

    """
    with _Seeing(None) as seeing:
        yield seeing.calls


@contextmanager
def switching_dropout_calls(on: bool, rates: Rates | None = None) -> Iterator[dict[Place, DropoutCall]]:
    """Turn functional dropout that no layer makes on or off: `training` and `dropout_p` of the calls are overridden.

    Without `rates`, an attention that gets `dropout_p=0` in evaluation mode drops at the rate that its module keeps, as
    an attribute with one of the usual names. Compiled code runs as it is written.

    Args:
        on: Whether these calls drop.
        rates: At which rates, as a pass in training mode has shown. Others then stay as they are.

    Yields:
        The calls, each place once, filled while a model runs.

    """
    with torch.compiler.set_stance("force_eager"), _Seeing(on, rates) as seeing:
        yield seeing.calls


def _caller() -> FrameType | None:
    """Find what calls a function of torch: a layer of torch, or the code of a user or another library."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OF_LAYERS) or not (file.startswith(TORCH) or file in BETWEEN):
            return frame
        frame = frame.f_back
    return None
