"""Retrain the best patterns of a search with fresh seeds, and choose among them."""

import math
import statistics
from collections import defaultdict
from pathlib import Path

import optuna
from optuna.trial import TrialState

from lightning_ydrop.checks import check_count
from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search.cli import SearchCLI
from lightning_ydrop.search.files import write_patterns
from lightning_ydrop.search.objective import train_once
from lightning_ydrop.search.processes import start_workers
from lightning_ydrop.search.sampler import PatternSampler, make_sampler, seed_of
from lightning_ydrop.search.space import PatternSpace
from lightning_ydrop.search.storage import open_claims, open_study
from lightning_ydrop.search.studies import best_of, choices_of, existing_study, finished, space_of, write_config
from lightning_ydrop.search.training import Training
from lightning_ydrop.search.workers import TrialError, queue_trials, work

# The name of the controller's most likely patterns among the candidates.
MOST_LIKELY = "most likely"


def export(storage: str, study_name: str, top: int, seeds: int, workers: int, out: Path, file: Path) -> None:
    """Retrain the best patterns of a study with fresh seeds, and write the best of them as YAML.

    The candidates are the distinct patterns with the highest mean reward, and those that the controller of the study,
    if it has one, finds most likely. The best of many noisy trials looks better than it is, so the rewards of the
    search don't count here. The metric does, of fresh trainings; a test set has no part in this.

    Started again, it goes on. The trainings are trials of a study of their own, named after the search.

    Args:
        storage: Path or URL.
        study_name: Name of the search's study.
        top: How many of the best patterns are retrained.
        seeds: Trainings of each.
        workers: Processes that train at the same time.
        out: Folder for checkpoints.
        file: The YAML file to write.

    Raises:
        ConfigurationError: If an argument is out of range, the study is not there or has no finished trial, or no
            training finished.

    """
    check_count("export", "top", top, minimum=1, example=5)
    check_count("export", "seeds", seeds, minimum=1, example=5)
    study = existing_study(storage, study_name)
    file.parent.mkdir(parents=True, exist_ok=True)  # rather now than after all trainings
    space = space_of(study)
    candidates = candidates_of(study, space, top)
    config = out / f"{study_name}.yaml"
    write_config(study.user_attrs["config"], config)
    retrained_name = f"{study_name}, retrained"
    retrained = open_study(storage, retrained_name, direction="maximize", workers=workers)
    claims = open_claims(storage, retrained_name)
    runs = [_run_name(choices, seed) for seed in range(seeds) for choices in candidates.values()]
    queue_trials(retrained, claims, {name: {} for name in runs})
    claims.close()
    print(f"{len(candidates)} candidates, {seeds} trainings of each")
    start_workers(workers, be_worker, str(config), storage, retrained_name, str(out / retrained_name))
    best = _tell(retrained, candidates, seeds)
    patterns = space.patterns(candidates[best])
    write_patterns(patterns, file)
    if all(pattern.is_empty for pattern in patterns.values()):
        print("The best drop nothing: at these places no pattern did better than none.")
    print(f"{file} is written, with the patterns of {best}: PatternCallback({str(file)!r}) trains with them")


def candidates_of(study: optuna.Study, space: PatternSpace, top: int) -> dict[str, list[int]]:
    """Choose what is worth retraining.

    Args:
        study: The study of a search.
        space: What it searches.
        top: How many of the best patterns.

    Returns:
        Choices by name: "trial 17", and "most likely" for those of the controller.

    """
    by_patterns = defaultdict(list)
    best_of(finished(study))  # which raises where all diverged
    for trial in (trial for trial in finished(study) if "diverged" not in trial.user_attrs):
        by_patterns[space.distinct(choices_of(space, trial.params))].append(trial)
    means = {
        patterns: statistics.fmean(float(trial.value or 0.0) for trial in trials)
        for patterns, trials in by_patterns.items()
    }
    best = sorted(means, key=means.__getitem__, reverse=True)[:top]
    firsts = [by_patterns[patterns][0] for patterns in best]
    chosen = {f"trial {first.number}": choices_of(space, first.params) for first in firsts}
    config = study.user_attrs["config"]
    sampler = make_sampler(config["sampler"], space, int(config["seed_everything"] or 0))
    if isinstance(sampler, PatternSampler):
        sampler.replay(study)
        likely = sampler.policy.most_likely()
        if space.distinct(likely) not in best:
            chosen[MOST_LIKELY] = likely
    return chosen


def be_worker(config: str, storage: str, study_name: str, folder: str) -> None:
    """Be one worker: retrain what is queued, until nothing is left.

    Args:
        config: File of the configuration.
        storage: Path or URL.
        study_name: Name of the study of retrainings.
        folder: Where checkpoints lie.

    """
    training = Training(SearchCLI(["--config", config]))
    space, in_processes = training.space(), training.num_processes > 1

    def objective(trial: optuna.Trial, folder: Path) -> float:
        choices, seed = _from_run_name(trial.user_attrs["name"])
        fresh = seed_of(training.cli.seed, seed, "retraining")
        patterns = space.patterns(choices)
        outcome = train_once(training, Path(config) if in_processes else None, patterns, fresh, folder)
        if math.isnan(outcome.reward):
            raise TrialError(f"{trial.user_attrs['name']}: the training diverged.")
        return outcome.reward

    study, claims = open_study(storage, study_name), open_claims(storage, study_name)
    work(study, objective, claims, folder=folder, total=None, draw=False, max_failures=None)
    claims.close()


def _tell(retrained: optuna.Study, candidates: dict[str, list[int]], seeds: int) -> str:
    """Print what each candidate reached, and name the best."""
    values = {
        trial.user_attrs["name"]: float(trial.value or 0.0)
        for trial in retrained.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    }
    for trial in retrained.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        print(f"A training failed: {trial.user_attrs.get('error', 'its worker died')}")
    means: dict[str, float] = {}
    for name, choices in candidates.items():
        runs = [_run_name(choices, seed) for seed in range(seeds)]
        rewards = [values[run] for run in runs if run in values]
        if not rewards:
            print(f"{name:>12}: no training finished")
            continue
        means[name] = statistics.fmean(rewards)
        error = statistics.stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else math.nan
        known = "" if math.isnan(error) else f", standard error {error:.4f}"
        print(f"{name:>12}: mean reward {means[name]:.4f}{known}, {len(rewards)} training(s)")
    if not means:
        raise ConfigurationError(
            f"export retrained {len(candidates)} candidates.",
            "None of the trainings finished, so there is nothing to choose from.",
            "Look at the errors above, and start again.",
        )
    return max(means, key=means.__getitem__)


def _run_name(choices: list[int], seed: int) -> str:
    return f"{' '.join(map(str, choices))} with seed {seed}"


def _from_run_name(name: str) -> tuple[list[int], int]:
    choices, _, seed = name.partition(" with seed ")
    return [int(each) for each in choices.split()], int(seed)
