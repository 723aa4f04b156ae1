"""Distil networks that were trained with dropout, and see how close one pass comes to the average over their masks.

    python -m examples.paper.run --rows digits --arms dropout ydrop --keep-checkpoints --out runs/teachers
    python -m examples.paper.distillation --runs runs/teachers

Each teacher has two students, one of its own architecture, from its weights, and one of half the width. On the test
set their predictions, the teacher's in one pass, and Monte Carlo averages are compared with an average over --samples
masks. Students stay beside their teacher, in students/, and what is measured in distilled.json: started again, the
program goes on with students that it was training, and does anew what was done with other arguments or of a teacher
that has been trained again since. All of it is also in distilled.jsonl in --runs, a line for each teacher: a record to
keep, of which the table can be made again.
"""

import argparse
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from examples.paper.experiment import gather, last_of, write_at_once
from examples.paper.kept import checkpoint_of, config_of, made_again, read, record_of
from examples.paper.pool import Pool, complete
from examples.paper.results import commands_in, place
from examples.paper.results import read as experiments_in
from examples.paper.tables import markdown, spread
from lightning_ydrop import DropoutDistillation, monte_carlo
from lightning_ydrop.callbacks.exact_resume import ExactResume
from lightning_ydrop.callbacks.last_epoch import LastEpoch
from lightning_ydrop.uncertainty import MonteCarlo, MonteCarloDivergence

TEXT = """# Distillation of {row}

By `{command}`, of networks that were trained with `--keep-checkpoints`:

{commands}

On the test set: KL(average || prediction), where the average is over {samples} masks, and how right the predictions
are; mean and standard deviation over teachers. The student starts from its teacher's weights, the one of half the
width from none; they are trained until the validation loss falls no more, for at most {max_epochs} epochs.

{table}
"""
COLUMNS = ("divergence", "accuracy", "negative log-likelihood")
# What a comparison was made with: how many masks it is with, and how long students were trained at most.
Settings = Mapping[str, int]
# What gives logits, or their logarithms of probabilities, for a batch.
Predictor = Callable[[Tensor], Tensor]


def distilled(result: Path, settings: Settings) -> dict[str, dict[str, float]]:
    """Distil the network of one run, and measure everything on its test set, by predictor."""
    samples, max_epochs = settings["samples"], settings["max_epochs"]
    sys.argv[1:] = []  # LightningCLI warns of arguments that it is not to read
    config = config_of(result)
    made = made_again(config)
    arguments = config["model"]["init_args"]
    smaller = {"hidden": [width // 2 for width in arguments["hidden"]], "dropout": "none"}
    halved = config["model"] | {"init_args": arguments | smaller}
    students = result.with_name("students") / f"{identity_of(result)}_{max_epochs}"
    predictors: dict[str, Predictor] = {}
    for name, student in (("student", None), ("half the width", made_again(config | {"model": halved}).model)):
        seed_everything(record_of(result)["seed"], verbose=False)
        distillation = DropoutDistillation(
            made.model,
            checkpoint=str(checkpoint_of(result)),
            student=student,
            num_masks=4,
            optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        )
        predictors[name] = taught(distillation, made.datamodule, students / name.replace(" ", "_"), max_epochs)
    teacher = distillation.teacher
    for masks in sorted({10, 100, samples}):
        predictors[f"{masks} masks"] = partial(averaged, teacher, masks)
    return measured({"one pass": teacher, **predictors}, teacher, made.datamodule, samples)


def quietened() -> None:
    """Leave the terminal to the progress bar: Lightning has the same to say of every student."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)


def taught(distillation: DropoutDistillation, data: LightningDataModule, folder: Path, max_epochs: int) -> nn.Module:
    """Train a student as its teacher was trained, until the validation loss falls no more, or go on from a folder."""
    best = ModelCheckpoint(folder, monitor="val_loss")
    last = LastEpoch(str(folder))
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=max_epochs,
        devices=1,
        callbacks=[EarlyStopping("val_loss", patience=10), best, ExactResume(), last],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(distillation, data, ckpt_path=last_of(folder))
    distillation.student.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return distillation.student.cpu().eval()


def averaged(teacher: nn.Module, masks: int, x: Tensor) -> Tensor:
    """Predict by a Monte Carlo average."""
    return monte_carlo(teacher, x, masks).probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()


def measured(
    predictors: Mapping[str, Predictor], teacher: nn.Module, data: LightningDataModule, samples: int
) -> dict[str, dict[str, float]]:
    """Measure predictors on the test set, against an average over so many masks."""
    data.setup("test")
    teacher.cpu().eval()
    metrics = {name: (MonteCarloDivergence(), MeanMetric(), MeanMetric()) for name in predictors}
    with torch.no_grad():
        for x, y in data.test_dataloader():
            average: MonteCarlo = monte_carlo(teacher, x, samples)
            for name, predict in predictors.items():
                logits = predict(x)
                divergence, accuracy, likelihood = metrics[name]
                divergence.update(logits, average)
                accuracy.update(logits.argmax(1).eq(y).float())
                likelihood.update(F.cross_entropy(logits, y, reduction="none"))
    return {
        name: {column: float(metric.compute()) for column, metric in zip(COLUMNS, each, strict=True)}
        for name, each in metrics.items()
    }


def measured_before(result: Path, settings: Settings) -> dict[str, dict[str, float]] | None:
    """Read what was measured of this very teacher with the same settings."""
    file = result.with_name("distilled.json")
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    same = kept.items() >= {"teacher": identity_of(result), **settings}.items()
    return kept["measured"] if same else None


def identity_of(result: Path) -> str:
    """Say which network the teacher is: one that is trained anew leaves another checkpoint."""
    return hashlib.sha256(checkpoint_of(result).read_bytes()).hexdigest()


def table(arms: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> str:
    """Lay out mean and standard deviation over teachers."""
    lines: list[Sequence[str]] = [
        [
            "teacher trained with",
            "prediction",
            "divergence, 1e-3 nats",
            "accuracy, %",
            "negative log-likelihood",
            "teachers",
        ]
    ]
    for arm, teachers in arms.items():
        for name in teachers[0]:
            divergence, accuracy, likelihood = ([teacher[name][column] for teacher in teachers] for column in COLUMNS)
            lines.append(
                [
                    arm,
                    name,
                    spread([1000 * each for each in divergence], 2),
                    spread([100 * each for each in accuracy], 2),
                    spread(likelihood, 4),
                    str(len(teachers)),
                ]
            )
    return markdown(lines)


def distil(folder: Path, settings: Settings, jobs: int) -> None:
    """Distil the networks of a grid, as far as that is not done, and write its distilled.jsonl.

    Raises:
        SystemExit: If some could not be distilled.

    """
    results = {str(result.parent.relative_to(folder)): result for result in read(folder)}
    left: dict[str, dict[str, Any]] = {
        name: {} for name, result in results.items() if measured_before(result, settings) is None
    }
    pool = Pool(str(folder / "studies.journal"), " ".join(["distillation", *map(str, settings.values())]), jobs)
    latest = pool.run(partial(distil_one, results, settings), left, again=True, unit="teacher")
    if failures := len(left) - len(complete(latest)):
        raise SystemExit(f"{failures} of {len(left)} teachers are not distilled, for the reasons above.")
    lines = [
        record_of(result) | {**settings, "measured": measured_before(result, settings)} for result in results.values()
    ]
    gather(lines, folder / "distilled.jsonl")


def distil_one(results: Mapping[str, Path], settings: Settings, trial: optuna.Trial, folder: Path) -> float:
    """Distil the network that a trial names, and write what is measured beside it."""
    del folder  # students are kept beside their teacher
    quietened()
    result = results[trial.user_attrs["name"]]
    measured = distilled(result, settings)
    write_at_once(
        result.with_name("distilled.json"), {**settings, "teacher": identity_of(result), "measured": measured}
    )
    return measured["student"]["divergence"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/teachers"), help="what run.py left, of one row, or its distilled.jsonl"
    )
    parser.add_argument("--samples", type=int, default=1000, help="masks of the average that all are compared with")
    parser.add_argument("--max-epochs", type=int, default=200, help="for how long students are trained at most")
    parser.add_argument("--jobs", type=int, default=1, help="teachers at a time")
    parser.add_argument("--out", type=Path, help="file for the table; distillation.md in or beside --runs by default")
    known = parser.parse_args(args)
    record = known.runs
    settings = {"samples": known.samples, "max_epochs": known.max_epochs}
    if not record.is_file():
        distil(record, settings, known.jobs)
        record /= "distilled.jsonl"
    (experiment,) = experiments_in([record])
    arguments = f"--samples {known.samples} --max-epochs {known.max_epochs}"
    if not all(run.items() >= settings.items() for run in experiment.runs()):
        raise SystemExit(f"{record} holds comparisons that were made with other arguments than {arguments}.")
    (arms,) = experiment.arms.values()
    text = TEXT.format(
        row=experiment.row,
        command=f"python -m examples.paper.distillation --runs {known.runs} {arguments}",
        commands=commands_in(record),
        **settings,
        table=table({arm: [run["measured"] for run in arms[arm].values()] for arm in sorted(arms, key=place)}),
    )
    (known.out or record.with_name("distillation.md")).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
