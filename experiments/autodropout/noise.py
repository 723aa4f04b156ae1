"""Is there anything to find? The reward's noise between seeds, against its spread between random patterns.

    python -m experiments.autodropout.noise --task digits --storage runs/autodropout.journal --workers 2

It trains without patterns and with one fixed random pattern, 10 seeds each, and with 20 random patterns, 2 seeds each.
The two seeds of the patterns tell how much of the spread between patterns is noise (analysis of variance).
"""

import argparse
import statistics
from pathlib import Path

from experiments.autodropout.trainings import Arm, train_arms
from lightning_ydrop.search.sampler import seed_of
from lightning_ydrop.search.training import SearchCLI, Training

HERE = Path(__file__).parent
NUM_PATTERNS = 20
SEEDS_OF_ONE = range(10)
SEEDS_OF_MANY = range(2)


def random_arms(training: Training, count: int) -> list[Arm]:
    """Draw patterns as the first trials of a random search, each choice uniform."""
    import random

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=sorted(path.stem for path in HERE.glob("*.yaml")))
    parser.add_argument("--storage", required=True)
    parser.add_argument("--workers", type=int, default=1)
    known = parser.parse_args()
    config = HERE / f"{known.task}.yaml"
    training = Training(SearchCLI(["--config", str(config)]))
    metric, reward = training.settings.metric, training.settings.reward
    arms = random_arms(training, NUM_PATTERNS)
    name = f"{known.task} noise"
    train_arms(config, arms, SEEDS_OF_MANY, known.storage, name, known.workers)
    records = train_arms(config, [Arm("none"), arms[0]], SEEDS_OF_ONE, known.storage, name, known.workers)
    for arm in ("none", arms[0].name):
        values = [reward(record[metric]) for record in records if record["arm"] == arm]
        print(
            f"{arm}: mean {statistics.fmean(values):.4f}, standard deviation over seeds {statistics.stdev(values):.4f}"
        )
    records = train_arms(config, arms, SEEDS_OF_MANY, known.storage, name, known.workers)
    by_arm = {arm.name: [reward(each[metric]) for each in records if each["arm"] == arm.name] for arm in arms}
    pairs = [(values[0], values[1]) for values in by_arm.values()]
    seeds, patterns = variance_components(pairs)
    means = sorted((first + second) / 2 for first, second in pairs)
    print(f"{NUM_PATTERNS} random patterns: mean {statistics.fmean(means):.4f}, from {means[0]:.4f} to {means[-1]:.4f}")
    print(f"standard deviation between seeds {seeds:.4f}, between patterns {patterns:.4f}")


if __name__ == "__main__":
    main()
