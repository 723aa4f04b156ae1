"""The program of a search: fit, export, plot."""

import argparse
import json
import math
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.apart import report_over
from lightning_ydrop.search.cli import SearchCLI
from lightning_ydrop.search.export import export
from lightning_ydrop.search.files import read_patterns
from lightning_ydrop.search.objective import PatternObjective
from lightning_ydrop.search.processes import start_workers
from lightning_ydrop.search.progress import Progress
from lightning_ydrop.search.sampler import make_sampler
from lightning_ydrop.search.space import PatternSpace
from lightning_ydrop.search.storage import open_claims, open_study, shown
from lightning_ydrop.search.studies import (
    best_of,
    existing_study,
    finished,
    open_search,
    patterns_of,
    space_of,
    write_config,
)
from lightning_ydrop.search.training import Training
from lightning_ydrop.search.workers import work

DESCRIPTION = """Search for the dropout patterns of a network (AutoDropout, arXiv 2101.01761).

  fit      train with patterns that a controller chooses, and learn from the reward
  export   retrain with the best patterns of a study and fresh seeds, and write the best of them as YAML
  plot     draw the rewards of a study and its best patterns

`... fit --help` lists the arguments of each.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    given = list(sys.argv[1:] if args is None else args)
    commands = {"fit": fit, "export": export_study, "plot": plot, "train": train}
    if not given or given[0] not in commands:
        print(DESCRIPTION)
        raise SystemExit(0 if given[:1] in ([], ["-h"], ["--help"]) else f"There is no command {given[0]!r}.")
    try:
        commands[given[0]](given[1:])
    except ConfigurationError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def fit(args: Sequence[str]) -> None:
    """Search until the study has as many trials as it is to have. Started again, it goes on."""
    cli = SearchCLI(list(args))
    training = Training(cli)
    space = training.space()
    training.dry_run(everywhere(space))
    study = open_search(cli, space)
    config = cli.out / f"{cli.study_name}.yaml"
    write_config(cli.identity(), config)
    total, metric = cli.config["trials"], training.settings.metric
    print(
        f"study {cli.study_name!r} in {shown(cli.storage)}: {len(space.kinds)} places, {len(space.tokens)} choices; "
        f"the reward is {metric if training.settings.mode == 'max' else f'minus {metric}'}"
    )
    logger = cli.search_logger()
    arguments = (str(config), cli.storage, cli.study_name, str(cli.folder), total)
    start_workers(cli.config["workers"], be_worker, *arguments, tick=Progress(study, space, total, logger))
    if logger is not None:
        logger.finalize("success")
    best = best_of(finished(study))
    print(
        f"The best reward is {best.value:.4f}, of trial {best.number}. The best of many noisy trials looks better than "
        "it is; this retrains the best patterns with fresh seeds:\n"
        f"  python -m lightning_ydrop.search export --storage {shlex.quote(shown(cli.storage))} "
        f"--study {shlex.quote(cli.study_name)}"
    )


def be_worker(config: str, storage: str, study_name: str, folder: str, total: int) -> None:
    """Be one worker of a search.

    Args:
        config: File of the configuration.
        storage: Path or URL.
        study_name: Name of the study.
        folder: Where the checkpoints of trials lie.
        total: Trials that the study is to have.

    """
    training = Training(SearchCLI(["--config", config]))
    space = training.space()
    sampler = make_sampler(training.cli.config["sampler"], space, training.cli.seed)
    study = open_study(storage, study_name, direction="maximize", sampler=sampler)
    claims = open_claims(storage, study_name)
    objective = PatternObjective(training, space, Path(config))
    work(study, objective, claims, folder=folder, total=total)
    claims.close()


def everywhere(space: PatternSpace) -> dict[str, Pattern]:
    """Give each place the largest upright pattern of a search, which is the first to cover a map."""
    choices = []
    for token in space.tokens:
        values = list(token.values)
        if token.field in ("rotate", "shear_x", "shear_y"):
            choices.append(values.index(0) if 0 in values else 0)
        else:  # "all", the longest run, stands for the largest number
            choices.append(values.index(max(values, key=lambda value: math.inf if value == "all" else float(value))))
    return space.patterns(choices)


def train(args: Sequence[str]) -> None:
    """Train once, with the patterns of a file: a trial whose training takes several processes starts this."""
    config, patterns, seed, folder, file, *pipes = args
    training = Training(SearchCLI(["--config", config]))
    report = report_over(*map(int, pipes)) if pipes else None
    outcome = training(read_patterns(patterns), int(seed), Path(folder), report)
    if training.cli.trainer.is_global_zero:
        Path(file).write_text(json.dumps(vars(outcome)))


def export_study(args: Sequence[str]) -> None:
    """Retrain the best patterns of a study with fresh seeds, and write the best of them as YAML."""
    parser = _parser("export", export_study.__doc__)
    parser.add_argument("--top", type=int, default=5, help="how many of the best patterns are retrained")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="folder for checkpoints")
    parser.add_argument("--patterns", type=Path, default=Path("patterns.yaml"), help="the file to write")
    known = parser.parse_args(args)
    export(known.storage, known.study, known.top, known.seeds, known.workers, known.out, known.patterns)


def plot(args: Sequence[str]) -> None:
    """Draw the rewards of studies over their trials, and the best patterns of the first of them, place by place."""
    from lightning_ydrop.search.plots import draw_patterns, draw_rewards

    parser = _parser("plot", plot.__doc__, nargs="+")
    parser.add_argument("--patterns", type=Path, help="draw the patterns of this YAML file instead")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for rewards.png and patterns.png")
    known = parser.parse_args(args)
    studies = {name: existing_study(known.storage, name) for name in known.study}
    rewards = {name: [float(trial.value or 0.0) for trial in finished(study)] for name, study in studies.items()}
    first = next(iter(studies.values()))
    patterns = read_patterns(known.patterns) if known.patterns else patterns_of(space_of(first), first.best_trial)
    known.out.mkdir(parents=True, exist_ok=True)
    draw_rewards(rewards, known.out / "rewards.png")
    draw_patterns(patterns, known.out / "patterns.png")
    print(f"{known.out / 'rewards.png'} and {known.out / 'patterns.png'} are written")


def _parser(command: str, description: str | None, **of_study: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m lightning_ydrop.search {command}", description=description)
    parser.add_argument("--storage", required=True, help="a journal file, or postgresql://...")
    parser.add_argument("--study", required=True, help="its name", **of_study)
    return parser
