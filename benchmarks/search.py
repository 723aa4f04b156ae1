"""What a trial costs besides its training: to draw, to learn, to replay a study, and all of it in a worker."""

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from jsonargparse import auto_cli
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, create_trial

from benchmarks.measuring import interleaved
from benchmarks.report import write_report
from lightning_ydrop.search.controller import TablePolicy, TransformerPolicy
from lightning_ydrop.search.sampler import SAMPLERS, make_sampler
from lightning_ydrop.search.space import PatternSpace
from lightning_ydrop.search.storage import open_claims, open_study
from lightning_ydrop.search.workers import work

Row = dict[str, Any]


def main(
    places: Sequence[int] = (12, 48),
    trials: Sequence[int] = (200, 1000),
    samplers: Sequence[str] = SAMPLERS,
    rounds: int = 20,
    draws: int = 5,
    threads: int = 1,
) -> None:
    """Measure the overhead of a trial: in memory, and in a worker on a journal file.

    Args:
        places: How many places the patterns are for, each with 8 tokens.
        trials: How many finished trials a new sampler finds before its first draw. A worker runs as many as the first.
        samplers: Which.
        rounds: How often a policy's drawing and learning are timed.
        draws: How many draws with finished trials are timed after the first. TPE takes seconds for each.
        threads: Of the CPU.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows: list[Row] = []
    for count in places:
        space = PatternSpace({f"stage1.{number}": "conv" for number in range(1, count + 1)})
        finished = random_trials(space, max(trials))
        for name in samplers:
            row: Row = {"places": count, "sampler": name, **_costs_of_policy(name, space, rounds)}
            for number in trials:
                row[f"first draw after {number} trials s"], row[f"draw after {number} trials ms"] = _resumed(
                    name, space, finished[:number], draws
                )
            row[f"trial {trials[0]} of a worker ms"] = _worked(name, space, trials[0])
            rows.append(row)
    write_report("search", torch.device("cpu"), settings, rows)


def random_trials(space: PatternSpace, count: int) -> list[FrozenTrial]:
    """Make finished trials of random patterns and rewards."""
    draw = random.Random(0)
    distributions = {token.name: CategoricalDistribution(token.values) for token in space.tokens}
    trials = []
    for number in range(count):
        choices = [draw.randrange(len(token.values)) for token in space.tokens]
        params = {token.name: token.values[choice] for token, choice in zip(space.tokens, choices, strict=True)}
        trials.append(
            create_trial(
                value=draw.random(),
                params=params,
                distributions=dict(distributions),
                user_attrs={"draw": {"choices": choices, "log_prob": -10.0 * len(choices) / 8, "index": number}},
            )
        )
    return trials


def _costs_of_policy(name: str, space: PatternSpace, rounds: int) -> Row:
    """Time a policy's draws and updates, without Optuna."""
    if name not in ("table", "transformer"):
        return {"sample ms": "", "learn ms": ""}
    policy = TablePolicy(space) if name == "table" else TransformerPolicy(space)
    choices, log_prob = policy.sample(0)
    runs = {"sample ms": lambda: policy.sample(1), "learn ms": lambda: policy.learn(choices, 0.0, log_prob)}
    seconds = interleaved(runs, rounds=rounds, device=torch.device("cpu"))
    return {column: 1e3 * statistics.median(values) for column, values in seconds.items()}


def _resumed(name: str, space: PatternSpace, finished: Sequence[FrozenTrial], draws: int) -> tuple[float, float]:
    """Time the first draw of a new sampler in a study with finished trials, and the draws after it."""
    study = optuna.create_study(sampler=make_sampler(name, space))
    for trial in finished:
        study.add_trial(trial)
    seconds = []
    for _ in range(1 + draws):
        start = time.perf_counter()
        asked = study.ask()
        for token in space.tokens:
            asked.suggest_categorical(token.name, token.values)
        seconds.append(time.perf_counter() - start)
        study.tell(asked, 0.0)
    return seconds[0], 1e3 * statistics.median(seconds[1:])


def _worked(name: str, space: PatternSpace, trials: int) -> float:
    """Time the last tenth of the trials of a worker whose objective trains nothing."""
    ends = []

    def objective(trial: optuna.Trial, folder: Path) -> float:
        del folder
        return sum(
            float(token.values.index(trial.suggest_categorical(token.name, token.values))) for token in space.tokens
        )

    with tempfile.TemporaryDirectory() as folder:
        storage = f"{folder}/studies.journal"
        study = open_study(storage, "search", direction="maximize", sampler=make_sampler(name, space))
        claims = open_claims(storage, "search")
        work(
            study,
            objective,
            claims,
            folder=folder,
            total=trials,
            after_trial=lambda *_: ends.append(time.perf_counter()),
        )
        claims.close()
    last = ends[-max(2, trials // 10) :]
    return 1e3 * (last[-1] - last[0]) / (len(last) - 1)


if __name__ == "__main__":
    auto_cli(main)
