"""What YDropCallback says once in each fit: how it read the first batch, and what it will do."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_ydrop.errors import describe, listed
from lightning_ydrop.importance.engine import YDrop
from lightning_ydrop.importance.findings import Findings
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.layers.kinds import WITH_A_DROPOUT, drops
from lightning_ydrop.models.adapters import fields_of
from lightning_ydrop.models.calls import Inputs, Target
from lightning_ydrop.models.modules import named_modules

MOST_LAYERS = 8
# With this elasticity or more the fall after annealing is small: experiments/first_minutes.py.
QUICK = 0.1


def summary(engine: YDrop, announcement: str, batch: Any, inputs: Inputs, target: Target, changes_at_once: bool) -> str:
    """Say how a first batch was read and which layers are driven, once the dry run is done.

    Args:
        engine: The engine.
        announcement: When rates change.
        batch: The batch.
        inputs: What was read as the inputs.
        target: What was read as the target.
        changes_at_once: Whether rates jump then.

    """
    assert engine.findings is not None
    lines = [
        f"Y-Drop read the first batch: input {_placed(batch, inputs)}; "
        f"{_target(engine.settings.path.objective, batch, target)}.",
        f"It measures the units of {_layers(engine.findings)} on {engine.findings.num_samples} sample(s) of each "
        f"batch, in {engine.findings.num_rows} rows.",
        f"{announcement} {rates_to_come(engine)}{_warning(engine) if changes_at_once else ''}",
    ]
    return "\n  ".join([*lines, *_not_driven(engine)])


def _not_driven(engine: YDrop) -> list[str]:
    """Name what drops in the model without being a layer, and say what to write instead."""
    assert engine.findings is not None
    lines = []
    if calls := engine.findings.functional:
        lines.append(
            f"It does not drive calls of functions, which drop as before: {listed(calls)}. For Y-Drop to drive one, "
            "write self.drop = nn.Dropout(p) in __init__, and self.drop(x) in forward. Attention weights have no units."
        )
    modules = named_modules(engine.model)
    inside = [
        f"{name} ({type(module).__name__}, dropout={module.dropout:g})"
        for name, module in modules.items()
        if isinstance(module, WITH_A_DROPOUT) and drops(module)
    ]
    if inside:
        lines.append(
            f"It does not drive dropout inside {listed(inside)}. Place a dropout layer after one of these for Y-Drop "
            "to drive its units."
        )
    return lines


def _warning(engine: YDrop) -> str:
    """Tell beforehand that accuracy falls where rates change at once and the running mean follows slowly."""
    if engine.settings.elasticity >= QUICK:
        return ""
    return " Validation accuracy may fall for some epochs then, less so with elasticity=0.1, transition='linear'."


def rates_to_come(engine: YDrop) -> str:
    """Say which rates follow from the rates of the layers."""
    num_units = {} if engine.findings is None else engine.findings.plan.num_units
    rates = {engine.layers[name].p: engine.settings.buckets_of(engine.layers[name].p) for name in num_units}
    changes = [
        f"p={p:g} becomes about {buckets.low.expected:.2f} and {buckets.high.expected:.2f} by importance"
        for p, buckets in rates.items()
    ]
    return f"{', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''}."


def _layers(findings: Findings) -> str:
    units = [f"{name} ({count})" for name, count in findings.plan.num_units.items()]
    more = f", and {len(units) - MOST_LAYERS} more" if len(units) > MOST_LAYERS else ""
    return f"{len(units)} layer(s), {', '.join(units[:MOST_LAYERS])}{more},"


def _target(objective: Objective, batch: Any, target: Target) -> str:
    if objective.target_is_input:
        return f"objective {type(objective).__name__}, which compares the output with the input"
    if not objective.takes_target:
        return f"objective {type(objective).__name__}, which needs no target"
    if target is None:
        return 'no target, so the outputs are summed; for an autoencoder pass objective="reconstruction"'
    kind = "" if not isinstance(target, Tensor) else ", numbers" if target.is_floating_point() else ", whole numbers"
    return f"target {_placed(batch, target)}{kind}; objective {type(objective).__name__}"


def _placed(batch: Any, value: Any) -> str:
    """Describe a value, and say where in the batch it is."""
    if isinstance(value, Mapping):
        return f"({', '.join(f'{name}={_placed(batch, item)}' for name, item in value.items())})"
    if isinstance(value, (tuple, list)) and value is not batch:
        return f"({', '.join(_placed(batch, item) for item in value)})"
    shown = f"{tuple(value.shape)}" if isinstance(value, Tensor) else describe(value)
    if value is batch:
        return f"{shown}, the batch itself"
    for place, item in _items(batch):
        if item is value:
            return f"{shown} from {place}"
    return shown


def _items(batch: Any) -> Iterable[tuple[str, Any]]:
    named = fields_of(batch)
    if named is not None:
        return ((repr(name), value) for name, value in named.items())
    return ((f"item {index}", value) for index, value in enumerate(batch)) if isinstance(batch, (tuple, list)) else ()
