"""The settings of a search."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_ydrop.checks import check_choice, check_count, check_flag, check_fraction, is_list
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.search.space import ConvValues, TokenValues

Mode = Literal["max", "min"]
Measured = Literal["last", "best"]
# What metrics are called that should be small.
OF_LOSSES = re.compile(r"loss|err|mse|mae|nll|perplexity|entropy")


@dataclass(frozen=True)
class SearchSettings:
    """What a search tries, and what it is after.

    Args:
        metric: The reward: a number that the LightningModule logs in validation.
        mode: Whether the metric should be large, "max", or small, "min". The reward of "min" is minus the metric. It is
            "max" where it is left out, and has to be named for a metric that is called a loss or an error.
        measured: The metric of the "last" epoch, or of the "best". The best of many epochs is biased upwards.
        places: Names of places that the search is limited to; wildcards such as "stage2.*" work. None: all places.
        per_block: Whether each block of a Transformer has places of its own.
        conv: Values that the search tries at places of feature maps.
        token: Values that the search tries at places of tokens.
        warmup: Share of the steps of a training over which the patterns' `rate` rises from 0.
        prune_after: Epochs after which a trial may be stopped whose metric is below the median of the others at the
            same epoch. None: no trial is stopped.

    Raises:
        ConfigurationError: If an argument is out of range.

    """

    metric: str
    mode: Mode | None = None
    measured: Measured = "last"
    places: Sequence[str] | None = None
    per_block: bool = False
    conv: ConvValues = field(default_factory=ConvValues)
    token: TokenValues = field(default_factory=TokenValues)
    warmup: float = 0.0
    prune_after: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigurationError(
                f"SearchSettings(metric={describe(self.metric)}) was given.",
                "`metric` is the name of a number that the LightningModule logs in validation.",
                'Pass, for example, metric="val_loss" and mode="min".',
            )
        if self.mode is None:
            if OF_LOSSES.search(self.metric.lower()):
                raise ConfigurationError(
                    f"SearchSettings(metric={self.metric!r}) was given without `mode`.",
                    "A search makes the metric large, unless it is told otherwise.",
                    'Pass mode="min" if it should be small, otherwise mode="max".',
                )
            object.__setattr__(self, "mode", "max")
        check_choice("SearchSettings", "mode", self.mode, get_args(Mode))
        check_choice("SearchSettings", "measured", self.measured, get_args(Measured))
        check_flag("SearchSettings", "per_block", self.per_block)
        check_fraction("SearchSettings", "warmup", self.warmup, example=0.1)
        if self.prune_after is not None:
            check_count("SearchSettings", "prune_after", self.prune_after, minimum=1, example=5)
        if self.places is not None:
            places = list(self.places) if is_list(self.places) else [self.places]
            if not places or not all(isinstance(each, str) for each in places):
                raise ConfigurationError(
                    f"SearchSettings(places={describe(self.places)}) was given.",
                    "`places` lists names of places, at least one; `find_places(model)` shows them.",
                    'Pass, for example, places=["stage2.*"], or leave it out for all places.',
                )
            object.__setattr__(self, "places", places)

    def reward(self, metric: float) -> float:
        """Turn the metric into what is maximised."""
        return metric if self.mode == "max" else -metric
