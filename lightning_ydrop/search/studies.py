"""What a study knows of its search: the configuration and the space."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.cli import SearchCLI
from lightning_ydrop.search.sampler import check_study, make_sampler
from lightning_ydrop.search.space import ConvValues, PatternSpace, TokenValues
from lightning_ydrop.search.storage import is_url, open_storage, open_study, shown


def open_search(cli: SearchCLI, space: PatternSpace) -> optuna.Study:
    """Open the study of a search, or start it.

    Args:
        cli: The configuration.
        space: What is searched.

    Returns:
        The study, which keeps the configuration and the space as user attributes.

    Raises:
        ConfigurationError: If its storage can't be used, or the study is of another search.

    """
    if not is_url(cli.storage):
        Path(cli.storage).expanduser().parent.mkdir(parents=True, exist_ok=True)
    study = open_study(
        cli.storage,
        cli.study_name,
        direction="maximize",
        sampler=make_sampler(cli.config["sampler"], space, cli.seed),
        workers=cli.config["workers"],
    )
    check_study(study, space)
    identity, kept = cli.identity(), study.user_attrs.get("config")
    if kept is not None and kept != identity:
        name, before, now = _first_difference(kept, identity)
        raise ConfigurationError(
            f"The study {cli.study_name!r} in {shown(cli.storage)} was given with {name}={now!r}.",
            f"Its trials have {name}={before!r}: all trials of a study are of one configuration.",
            "Name another study with --study, or search with the configuration of this one.",
        )
    study.set_user_attr("config", identity)
    values = {"conv": dataclasses.asdict(space.conv), "token": dataclasses.asdict(space.token)}
    study.set_user_attr("space", {"kinds": dict(space.kinds), **values, "unsearched": dict(space.unsearched)})
    return study


def existing_study(storage: str, name: str) -> optuna.Study:
    """Open a study of a search that is there.

    Raises:
        ConfigurationError: If it is not there, or is none of a search.

    """
    opened = open_storage(storage) if is_url(storage) or Path(storage).expanduser().exists() else None
    names = [] if opened is None else optuna.get_all_study_names(opened)
    if opened is None or name not in names:
        raise ConfigurationError(
            f"--storage {shown(storage)} --study {name} was given.",
            f"The storage has the studies {', '.join(map(repr, names))}." if names else "There is no study there.",
            "Name a study that `python -m lightning_ydrop.search fit` has made.",
        )
    study = optuna.load_study(study_name=name, storage=opened)
    if "space" not in study.user_attrs:
        raise ConfigurationError(
            f"--study {name} was given.", "It is no study of a search.", "Name one that `fit` has made."
        )
    return study


def space_of(study: optuna.Study) -> PatternSpace:
    """Give what a study searches."""
    kept = study.user_attrs["space"]
    values = ConvValues(**kept["conv"]), TokenValues(**kept["token"])
    return PatternSpace(kept["kinds"], *values, kept.get("unsearched", {}))


def choices_of(space: PatternSpace, params: Mapping[str, Any]) -> list[int]:
    """Give the choices that a trial's parameters are."""
    return [token.values.index(params[token.name]) for token in space.tokens]


def patterns_of(space: PatternSpace, trial: FrozenTrial) -> dict[str, Pattern]:
    """Give the patterns of a trial."""
    return space.patterns(choices_of(space, trial.params))


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """List the trials with a reward, in order.

    Raises:
        ConfigurationError: If there is none.

    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    if not trials:
        raise ConfigurationError(
            f"The study {study.study_name!r} was given.", "None of its trials has finished.", "Go on with `fit` first."
        )
    return trials


def write_config(config: Mapping[str, Any], file: Path) -> None:
    """Write a configuration as YAML, for workers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))


def _first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            if before.get(key) != now.get(key):
                return _first_difference(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    return name, before, now


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """Give the trial with the highest reward of those that did not diverge.

    Raises:
        ConfigurationError: If all of them did.

    """
    trained = [trial for trial in trials if "diverged" not in trial.user_attrs]
    if not trained:
        raise ConfigurationError(
            f"All of {len(trials)} trials diverged.",
            "A search compares trainings whose metric is finite.",
            "Lower the learning rate, look at the data and the metric, and start a new study.",
        )
    return max(trained, key=lambda trial: float(trial.value or 0.0))
