"""What a controller finds with few trials: a synthetic reward, random search and TPE as opponents.

The reward of a candidate is a sum of main effects of its tokens and of interactions of pairs of them, scaled so that
random candidates have mean 0 and standard deviation 1. The controller sees it with noise, as trainings with other seeds
add it.
"""

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import torch
from jsonargparse import auto_cli

from benchmarks.report import write_report
from lightning_ydrop.search.controller import Policy, TablePolicy, TransformerPolicy
from lightning_ydrop.search.sampler import make_sampler
from lightning_ydrop.search.space import PatternSpace

Row = dict[str, Any]
Trace = list[tuple[list[int], float]]  # choices and their true reward, trial by trial


class SyntheticReward:
    """A reward of main effects and interactions.

    Args:
        space: What is chosen.
        seed: Seed of the effects.
        interactions: How many pairs of tokens interact, as a multiple of the number of tokens.
        scale: Standard deviation of an interaction over that of a main effect.

    """

    def __init__(self, space: PatternSpace, seed: int, interactions: float = 2.0, scale: float = 0.7) -> None:
        draw = np.random.default_rng(seed)
        sizes = [len(token.values) for token in space.tokens]
        self.main = [draw.normal(size=size) for size in sizes]
        pairs = [draw.choice(len(sizes), 2, replace=False) for _ in range(round(interactions * len(sizes)))]
        self.pairs = [(int(i), int(j), scale * draw.normal(size=(sizes[i], sizes[j]))) for i, j in pairs]
        self.mean, self.spread = 0.0, 1.0
        values = [self([int(draw.integers(size)) for size in sizes]) for _ in range(4000)]
        self.mean, self.spread = statistics.fmean(values), statistics.pstdev(values)

    def __call__(self, choices: Sequence[int]) -> float:
        """Give the true reward."""
        total = sum(effects[choice] for effects, choice in zip(self.main, choices, strict=True))
        total += sum(effects[choices[i], choices[j]] for i, j, effects in self.pairs)
        return float((total - self.mean) / self.spread)


def search(
    policy: Policy, reward: Callable[[Sequence[int]], float], trials: int, noise: float, late: int, seed: int
) -> Trace:
    """Let a policy search. A reward comes `late` draws after its own draw."""
    draw = np.random.default_rng(seed)
    waiting: deque[tuple[list[int], float, float]] = deque()
    trace: Trace = []
    for number in range(trials):
        choices, log_prob = policy.sample(1_000_003 * seed + number)
        true = reward(choices)
        trace.append((choices, true))
        waiting.append((choices, true + noise * float(draw.normal()), log_prob))
        if len(waiting) > late:
            policy.learn(*waiting.popleft())
    return trace


def search_with_optuna(
    name: str, space: PatternSpace, reward: Callable[[Sequence[int]], float], trials: int, noise: float, seed: int
) -> Trace:
    """Let a sampler search, by its name."""
    draw = np.random.default_rng(seed)
    study = optuna.create_study(sampler=make_sampler(name, space, seed), direction="maximize")
    trace: Trace = []
    for _ in range(trials):
        trial = study.ask()
        values = [trial.suggest_categorical(token.name, token.values) for token in space.tokens]
        choices = [token.values.index(value) for token, value in zip(space.tokens, values, strict=True)]
        trace.append((choices, reward(choices)))
        study.tell(trial, trace[-1][1] + noise * float(draw.normal()))
    return trace


def summary(trace: Trace, noise: float, seed: int) -> Row:
    """Summarise a search: the mean of its last tenth, and the true value of what seemed best."""
    draw = np.random.default_rng(seed)
    seen = [true + noise * float(draw.normal()) for _, true in trace]
    last = [true for _, true in trace[-max(1, len(trace) // 10) :]]
    return {"last tenth": statistics.fmean(last), "best draw": trace[int(np.argmax(seen))][1]}


def main(
    trials: Sequence[int] = (200, 400, 800),
    places: int = 4,
    seeds: int = 4,
    noise: float = 0.3,
    late: Sequence[int] = (0, 8),
    searchers: Sequence[str] = ("random", "tpe", "table", "transformer"),
) -> None:
    """Measure what searchers find, in standard deviations over the mean random candidate.

    Args:
        trials: Budgets. Each is a search of its own.
        places: Of the space.
        seeds: Rewards, each with a search of its own.
        noise: Standard deviation of the noise of a reward.
        late: By how many draws rewards come late. For the controllers alone.
        searchers: Which.

    """
    settings = dict(locals())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    space = PatternSpace({f"stage1.{number}": "conv" for number in range(1, places + 1)})
    rows: list[Row] = []
    for name in searchers:
        for delay in late if name in ("table", "transformer") else (0,):
            for budget in trials:
                each = []
                for seed in range(seeds):
                    reward = SyntheticReward(space, seed)
                    if name in ("table", "transformer"):
                        policy = TablePolicy(space) if name == "table" else TransformerPolicy(space, seed=seed)
                        trace = search(policy, reward, budget, noise, delay, seed)
                        sample_size = policy.effective_sample_size
                        each.append(
                            {
                                **summary(trace, noise, seed),
                                "most likely": reward(policy.most_likely()),
                                "entropy": policy.entropy(),
                                "effective sample size": sample_size,
                            }
                        )
                    else:
                        trace = search_with_optuna(name, space, reward, budget, noise, seed)
                        each.append(summary(trace, noise, seed))
                rows.append(_row(name, delay, budget, each))
                print(rows[-1], flush=True)
    write_report("budget", torch.device("cpu"), settings, rows)


def _row(name: str, late: int, trials: int, each: Sequence[Row]) -> Row:
    row: Row = {"searcher": name, "late": late, "trials": trials}
    for column in ("last tenth", "best draw", "most likely", "entropy", "effective sample size"):
        values = [one[column] for one in each if column in one]
        row[column] = statistics.fmean(values) if values else ""
        if column == "last tenth":
            row["standard error"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else ""
    return row


if __name__ == "__main__":
    auto_cli(main)
