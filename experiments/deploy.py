"""Is one pass of a student as good as many masks of its teacher? On scikit-learn's digits, in onnxruntime.

    python -m experiments.deploy --seeds 5

The teachers are perceptrons with dropout, trained on a tenth of the images (108). Their students learn the average over
masks, and with a head how uncertain it is, from all 1,078 training images or from the teacher's own, without labels and
in as many steps. All students are exported to ONNX, and what is measured is what onnxruntime returns. Times are those
that a processor spends in one thread, so other programs don't count, and the alternatives take turns. What is recorded
is not trained again. Tables go into docs/results.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import binary_auroc

from benchmarks.measuring import in_turn
from examples.data import Digits
from examples.deploy import (
    OUTPUTS,
    Served,
    auroc_of_errors,
    averaged,
    distilled,
    export,
    quieten,
    trained_teacher,
    uncertainties,
)
from examples.paper.tables import markdown, spread
from examples.uncertainty import measures

RECORDS = Path(__file__).parent / "records" / "deploy.jsonl"
OUT = Path(__file__).parents[1] / "docs/results/deploy"
TEACHERS_SHARE = 0.1  # of the training images
ONE_PASS, MASKS = "teacher, one pass", {"teacher, 10 masks": 10, "teacher, 100 masks": 100}
# Whether it has a head, the share of the images that it learns from, and epochs for 680 steps.
STUDENTS = {
    "student": (False, 1.0, 40),
    "student with a head": (True, 1.0, 40),
    "student with a head, the teacher's images only": (True, TEACHERS_SHARE, 340),
}
MODELS = (ONE_PASS, *MASKS, *STUDENTS)
KINDS = ("total", "aleatoric", "epistemic")
BATCHES = {1: 30, 360: 5}  # images in a batch, and rounds of timing
Uncertain = tuple[Tensor, Mapping[str, Tensor]]
Predict = Callable[[Tensor], Uncertain]


def judged(predict: Predict, inputs: Tensor, labels: Tensor, reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """Measure predictions, and each kind of uncertainty that comes with them.

    Args:
        predict: Gives probabilities and uncertainties.
        inputs: Images (B, 1, 8, 8).
        labels: Their labels.
        reference: The uncertainties of 100 other masks, shape (B,).

    Returns:
        Accuracy, NLL and ECE. For each kind of uncertainty: how often it is higher where the prediction is wrong, its
        rank correlation with the reference, its mean as a share of the reference's, and how often it is higher for an
        inverted image than for an image.

    """
    probabilities, parts = predict(inputs)
    of_inverted = predict(-inputs)[1]
    is_inverted = torch.cat([torch.zeros(len(inputs)), torch.ones(len(inputs))]).long()
    is_wrong = probabilities.argmax(1) != labels
    found: dict[str, Any] = dict(measures(probabilities, labels))
    found["auroc"] = {kind: auroc_of_errors(values, is_wrong) for kind, values in parts.items()}
    found["rank"] = {kind: float(spearman_corrcoef(values, reference[kind])) for kind, values in parts.items()}
    found["level"] = {kind: float(values.mean() / reference[kind].mean()) for kind, values in parts.items()}
    found["inverted"] = {
        kind: float(binary_auroc(torch.cat([values, of_inverted[kind]]), is_inverted)) for kind, values in parts.items()
    }
    return found


def times(runs: Mapping[str, Callable[[Tensor], object]], inputs: Tensor) -> dict[str, dict[str, float]]:
    """Time each run on batches of both sizes: the median of a processor's milliseconds."""
    found: dict[str, dict[str, float]] = {name: {} for name in runs}
    for size, rounds in BATCHES.items():
        timed = {name: functools.partial(_seconds_of, run, inputs[:size]) for name, run in runs.items()}
        for name, seconds in in_turn(timed, rounds=rounds, warm_up=1).items():
            found[name][str(size)] = 1e3 * statistics.median(seconds)
    return found


def _seconds_of(run: Callable[[Tensor], object], inputs: Tensor) -> float:
    """Give the time that the processor spends on it. A clock on the wall would also count other programs."""
    start = time.process_time()
    run(inputs)
    return time.process_time() - start


def difference(network: nn.Module, served: Served, inputs: Tensor) -> float:
    """Give the greatest difference between what torch and onnxruntime return."""
    with torch.inference_mode():
        outputs = network(inputs)
    of_torch = [outputs] if isinstance(outputs, Tensor) else outputs
    of_file = map(torch.from_numpy, served(inputs.numpy()).values())
    return max(float((one - other).abs().max()) for one, other in zip(of_file, of_torch, strict=True))


def measured(seed: int, steps: float = 1.0) -> list[dict[str, Any]]:
    """Train a teacher and its students, export them, and measure all.

    Args:
        seed: Of weights, batches, masks, and of the choice of images.
        steps: The share of the usual epochs.

    Returns:
        A record for each of MODELS.

    """
    L.seed_everything(seed, verbose=False)
    own = Digits(split_seed=seed, train_fraction=TEACHERS_SHARE)
    teacher = trained_teacher(own, max(1, round(60 * steps)))
    inputs, labels = own.test.inputs, own.test.labels
    reference = averaged(teacher, inputs, 100)[1]
    with tempfile.TemporaryDirectory() as folder:
        networks: dict[str, nn.Module] = {ONE_PASS: teacher}
        for name, (head, share, epochs) in STUDENTS.items():
            L.seed_everything(seed, verbose=False)
            data = Digits(split_seed=seed, train_fraction=share)
            networks[name] = distilled(teacher, data, max(1, round(epochs * steps)), uncertainty_head=head)
        served, differences = {}, {}
        for number, (name, network) in enumerate(networks.items()):
            file = Path(folder) / f"{number}.onnx"
            export(network, inputs[:2], file, OUTPUTS if name in STUDENTS and STUDENTS[name][0] else OUTPUTS[:1])
            served[name] = Served(file, threads=1)
            differences[name] = difference(network, served[name], inputs)
        in_torch: dict[str, Callable[[Tensor], object]] = {
            name: torch.inference_mode()(network) for name, network in networks.items()
        }
        in_torch |= {name: functools.partial(averaged, teacher, num_masks=count) for name, count in MASKS.items()}
        in_onnx = {f"{name}, onnxruntime": functools.partial(_run, each) for name, each in served.items()}
        milliseconds = times(in_torch | in_onnx, inputs)
        predict: dict[str, Predict] = {name: functools.partial(_answer, each) for name, each in served.items()}
        predict |= {name: functools.partial(averaged, teacher, num_masks=count) for name, count in MASKS.items()}
        return [
            {
                "seed": seed,
                "model": name,
                **judged(predict[name], inputs, labels, reference),
                "ms": milliseconds[name],
                **({"ms in onnxruntime": milliseconds[f"{name}, onnxruntime"]} if name in served else {}),
                **({"difference": differences[name]} if name in served else {}),
            }
            for name in MODELS
        ]


def _run(served: Served, inputs: Tensor) -> object:
    return served(inputs.numpy())


def _answer(served: Served, inputs: Tensor) -> Uncertain:
    return uncertainties(served(inputs.numpy()))


def quality(records: Sequence[Mapping[str, Any]]) -> str:
    """Lay out how right predictions are: mean and standard deviation over seeds."""
    lines = [["", "accuracy, %", "NLL, nats", "ECE, %"]]
    for name in MODELS:
        rows = [record for record in records if record["model"] == name]
        digits = {"accuracy": 2, "NLL": 3, "ECE": 2}
        lines.append([name, *(spread([row[column] for row in rows], count) for column, count in digits.items())])
    return markdown(lines)


def uncertainty(records: Sequence[Mapping[str, Any]], what: str) -> str:
    """Lay out one measure of each kind of uncertainty."""
    lines = [["", *KINDS]]
    for name in MODELS:
        rows = [record[what] for record in records if record["model"] == name]
        lines.append([name, *(spread([row[kind] for row in rows if kind in row], 3) for kind in KINDS)])
    return markdown(lines)


def cost(records: Sequence[Mapping[str, Any]]) -> str:
    """Lay out times, as ratios to one pass of the teacher in torch on the same batch: the median over seeds."""
    base = {record["seed"]: record["ms"] for record in records if record["model"] == ONE_PASS}
    places = {"torch": "ms", "onnxruntime": "ms in onnxruntime"}
    head = [f"{_images(size)}, {place}" for size in BATCHES for place in places]
    lines = [["", *head]]
    for name in MODELS:
        rows = [record for record in records if record["model"] == name]
        line = [name]
        for size in map(str, BATCHES):
            for column in places.values():
                ratios = [row[column][size] / base[row["seed"]][size] for row in rows if column in row]
                line.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        lines.append(line)
    return markdown(lines)


def _images(size: int) -> str:
    return "1 image" if size == 1 else f"{size} images"


def text(records: Sequence[Mapping[str, Any]]) -> str:
    """Write the report."""
    seeds = len({record["seed"] for record in records})
    largest = max(record.get("difference", 0.0) for record in records)
    return f"""# Deployed uncertainty

By `python -m experiments.deploy --seeds {seeds}`, from records in `experiments/records`.

scikit-learn's digits, {seeds} seeds, mean ± standard deviation over them. The teachers are perceptrons with two hidden
layers of 256 units and dropout at 0.5, trained on 108 images. Students learn from all 1,078 training images without
their labels, or from the teacher's own 108, four masks in each step. One pass and students run in onnxruntime, whose
outputs differ from torch's by {largest:.0e} at most. The test set has 360 images.

## Predictions

{quality(records)}

## Which predictions are wrong?

AUROC: how often a wrong prediction is more uncertain than a right one.

{uncertainty(records, "auroc")}

## The same uncertainty as of 100 masks?

Rank correlation over the test images with the uncertainty of 100 masks. A second draw of 100 masks shows what is
possible.

{uncertainty(records, "rank")}

Its mean, as a share of that of 100 masks:

{uncertainty(records, "level")}

## Images unlike those of training

AUROC: how often an inverted test image is more uncertain than a test image.

{uncertainty(records, "inverted")}

## Time

Processor time of one thread, as a ratio to one pass of the teacher in torch over the same images: the median of
{" and ".join(f"{rounds} rounds with {_images(size)}" for size, rounds in BATCHES.items())}, in which the
alternatives take turns, and then the median of the seeds. All include the call from Python.

{cost(records)}
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of report.md")
    known = parser.parse_args(args)
    if known.seeds < 1:
        parser.error(f"--seeds {known.seeds}: it is the number of seeds, at least 1.")
    quieten()
    torch.set_num_threads(1)
    RECORDS.parent.mkdir(exist_ok=True)
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    for seed in sorted(set(range(known.seeds)) - {record["seed"] for record in records}):
        new = measured(seed)
        with RECORDS.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in new)
        records += new
        print(f"seed {seed} is measured", flush=True)
    known.out.mkdir(parents=True, exist_ok=True)
    (known.out / "report.md").write_text(text(records))
    print(text(records))


if __name__ == "__main__":
    main()
