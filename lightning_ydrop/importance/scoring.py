"""One phase 1 as the dry run has planned it, and once more where a batch shows what the dry run could not see."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_ydrop.importance.findings import Findings
from lightning_ydrop.importance.measures import Measure, scores_by
from lightning_ydrop.importance.request import Request, request_from
from lightning_ydrop.importance.subject import Plan, needs_graph
from lightning_ydrop.models.calls import Inputs, Target
from lightning_ydrop.models.sharing import without_lost_memory


def scored(
    findings: Findings,
    measure: Measure,
    inputs: Inputs,
    target: Target,
    generator_for: Callable[[str], torch.Generator],
) -> tuple[Findings, Request | None, dict[str, Tensor]]:
    """Score the units on samples of a batch.

    A forward may start to take gradients long after the dry run, such as for a penalty after a warm-up. Then phase 1
    records gradients for parameters from that batch on, and looks once more at all that a pass may change.

    Args:
        findings: What the dry run has found out.
        measure: What scores the units.
        inputs: What forward takes.
        target: What F is taken with.
        generator_for: Gives the random numbers for a purpose.

    Returns:
        What is known from now on, the request, or None where the batch is too small, and the scores by layer.

    """

    def measured(plan: Plan, learning: bool) -> tuple[Request | None, dict[str, Tensor]]:
        request = request_from(findings.subject, findings.path, plan, inputs, target, generator_for, learning=learning)
        return request, {} if request is None else scores_by(measure, request)

    plan = findings.plan
    try:
        return findings, *without_lost_memory(partial(measured, plan, False))
    except Exception as error:
        if not (plan.constant_parameters and needs_graph(error)):
            raise
    plan = replace(plan, constant_parameters=False)
    return replace(findings, plan=plan), *without_lost_memory(partial(measured, plan, True))
