"""Is there anything to find? The reward's noise between seeds, against its spread between random patterns.

    python -m experiments.autodropout.noise --task digits --folder runs/digits --workers 2

It trains without patterns and with one fixed random pattern, 10 seeds each, and with 20 random patterns, 2 seeds each.
The two seeds of the patterns tell how much of the spread between patterns is noise (analysis of variance).
"""

import argparse
import random
import statistics

from experiments.autodropout.trainings import Arm, bench_of, write_records
from lightning_ydrop.search.sampler import seed_of
from lightning_ydrop.search.training import Training

NUM_PATTERNS = 20
SEEDS_OF_ONE = range(10)
SEEDS_OF_MANY = range(2)


def random_arms(training: Training, count: int) -> list[Arm]:
    """Draw patterns as the first trials of a random search, each choice uniform."""
    space = training.space()
    arms = []
    for index in range(count):
        draws = random.Random(seed_of(0, index, "noise"))
        choices = [draws.randrange(len(token.values)) for token in space.tokens]
        arms.append(Arm(f"random {index}", space.patterns(choices)))
    return arms


def variance_components(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Split the variance of two trainings of each pattern into that of seeds and that of patterns.

    Args:
        pairs: The rewards of each pattern with two seeds.

    Returns:
        The standard deviation between seeds, and that between patterns (0 where the estimate is negative).

    """
    within = statistics.fmean((first - second) ** 2 / 2 for first, second in pairs)
    between = statistics.variance([(first + second) / 2 for first, second in pairs]) - within / 2
    return within**0.5, max(between, 0.0) ** 0.5


def main() -> None:
    """Run the program."""
    bench, _ = bench_of(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    training = bench.training()
    metric, reward = training.settings.metric, training.settings.reward
    arms = random_arms(training, NUM_PATTERNS)
    many = bench.train("noise", arms, SEEDS_OF_MANY)
    few = bench.train("noise", [Arm("none"), arms[0]], SEEDS_OF_ONE)
    for arm in ("none", arms[0].name):
        values = [reward(record[metric]) for record in few if record["arm"] == arm]
        print(
            f"{arm}: mean {statistics.fmean(values):.4f}, standard deviation over seeds {statistics.stdev(values):.4f}"
        )
    by_arm = {arm.name: [reward(each[metric]) for each in many if each["arm"] == arm.name] for arm in arms}
    pairs = [(values[0], values[1]) for values in by_arm.values()]
    seeds, patterns = variance_components(pairs)
    means = sorted((first + second) / 2 for first, second in pairs)
    print(f"{NUM_PATTERNS} random patterns: mean {statistics.fmean(means):.4f}, from {means[0]:.4f} to {means[-1]:.4f}")
    print(f"standard deviation between seeds {seeds:.4f}, between patterns {patterns:.4f}")
    # The first pattern's first seeds are in both.
    write_records(bench.task, "noise", [*few, *(record for record in many if record not in few)])


if __name__ == "__main__":
    main()
