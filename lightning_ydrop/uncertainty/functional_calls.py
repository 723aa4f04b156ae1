"""Calls of functional dropout in passes of evaluation mode: which of them drop in training mode."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.nn.modules.batchnorm import _NormBase

from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe, listed
from lightning_ydrop.models.functional_dropout import Place, Rates, seeing_rates, switching_dropout_calls
from lightning_ydrop.models.modules import all_modules, is_training, set_training
from lightning_ydrop.uncertainty.draws import MaskSharing
from lightning_ydrop.uncertainty.masks import stochastic_modules
from lightning_ydrop.uncertainty.passes import Subject


@contextmanager
def dropping_in_calls(owner: str, subject: Subject, sharing: MaskSharing) -> Iterator[None]:
    """Let calls of functional dropout drop in passes inside, where they drop in training mode.

    Warns:
        NoEffectWarning: Of calls that passes in evaluation mode don't reach.

    Raises:
        ConfigurationError: At the end, if neither a layer nor a call has dropped.

    """
    rates = _learned(subject, sharing)
    with switching_dropout_calls(True, rates) as calls:
        yield
    dropping = [place for place, call in calls.items() if call.rate] if rates is None else _dropping(rates)
    missed = [place for place in dropping if place not in calls]
    if missed and not sharing.has_told_of_calls:
        sharing.has_told_of_calls = True
        warnings.warn(
            f"{owner}(functional=True) does not reach what drops in training mode alone, as under `if self.training`: "
            f"{_in_words(missed)}. Write F.dropout(x, p, self.training) there.",
            NoEffectWarning,
            stacklevel=4,
        )
    if len(missed) == len(dropping) and not stochastic_modules(subject.model):
        raise ConfigurationError(
            f"{owner}(functional=True) was given {describe(subject.model)}, in which neither a layer nor a call drops.",
            "It averages over masks of dropout. Calls that stand under `if self.training` are not reached.",
            "Write F.dropout(x, p, self.training), or use nn.Dropout.",
        )


def warn_of_calls_left_out(owner: str, subject: Subject, sharing: MaskSharing) -> None:
    """Warn, once, of calls that drop in training mode and were seen in passes where they don't.

    Warns:
        NoEffectWarning: If there are any.

    """
    if not sharing.rates_in_evaluation or sharing.has_told_of_calls:
        return
    sharing.has_told_of_calls = True
    always = _dropping(sharing.rates_in_evaluation)
    if dropping := [place for place in _dropping(_learned(subject, sharing) or {}) if place not in always]:
        warnings.warn(
            f"{owner} leaves out the dropout of {_in_words(dropping)}: calls do not drop in evaluation mode. "
            "Pass functional=True to let them.",
            NoEffectWarning,
            stacklevel=4,
        )


def _learned(subject: Subject, sharing: MaskSharing) -> Rates | None:
    """Learn the rates of calls by one pass in training mode, once. None if the model does not run there."""
    if not sharing.knows_rates:
        sharing.knows_rates, sharing.rates = True, _rates_in_training(subject)
    return sharing.rates


def _rates_in_training(subject: Subject) -> Rates | None:
    with ExitStack() as stack:
        stack.enter_context(subject.looked_at(evaluate=False))
        for module in all_modules(subject.model):
            if not is_training(module) and not isinstance(module, _NormBase):  # which may refuse a single row
                set_training(module, True)
                stack.callback(set_training, module, False)
        rates = stack.enter_context(seeing_rates())
        try:
            subject.call(1, slice(None))
        except Exception:  # some models take something else in training mode
            return None
    return rates


def _dropping(rates: Rates) -> list[Place]:
    return [place for place, of_calls in rates.items() if any(rate > 0 for rate in of_calls)]


def _in_words(places: Iterable[Place]) -> str:
    return listed(f"{function} ({file}:{line})" for function, file, line in places)
