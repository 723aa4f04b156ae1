"""What a teacher's predictions cost in dropout distillation: many masks in one pass, against as many passes."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jsonargparse import auto_cli

from benchmarks.measuring import interleaved, quartiles, ratios, training_step
from benchmarks.report import write_report
from benchmarks.step import BATCH_SIZE, CASES
from lightning_ydrop.uncertainty.averaging import mean_probabilities
from lightning_ydrop.uncertainty.draws import MaskSharing


def main(
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 30,
    networks: Sequence[str] = ("FC_1", "FC_2", "S_1"),
    num_masks: Sequence[int] = (1, 2, 4, 8),
    seed: int = 0,
) -> None:
    """Measure every network and number of masks; a batch has 64 samples.

    Args:
        device: Where.
        threads: Of the CPU.
        rounds: How often each alternative is timed.
        networks: The teachers, with nn.Dropout.
        num_masks: Masks for each sample.
        seed: Of weights and batch.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    where = torch.device(device)
    rows = []
    for name in networks:
        case = CASES[name]
        teacher = case.model("dropout").to(where)
        x = torch.randn(BATCH_SIZE, *case.shape, device=where)
        y = torch.randint(10, (BATCH_SIZE,), device=where)
        runs: dict[str, Callable[[], object]] = {"training step": training_step(case.model("none").to(where), x, y)}
        # Distillation learns in its first step that masks are not shared. Later steps take one pass, as timed here.
        sharing = MaskSharing()
        mean_probabilities(teacher, x, 3, sharing=sharing)
        for count in num_masks:
            runs[f"{count} one pass"] = partial(mean_probabilities, teacher, x, count, sharing=sharing)
            runs[f"{count} passes"] = partial(mean_probabilities, teacher, x, count, max_rows=BATCH_SIZE)
        seconds = interleaved(runs, rounds=rounds, device=where)
        rows += [
            {
                "network": name,
                "masks": count,
                "one pass ms": 1e3 * statistics.median(seconds[f"{count} one pass"]),
                "against as many passes": ratios(seconds, f"{count} passes")[f"{count} one pass"],
                "quartiles": quartiles(seconds, f"{count} one pass", f"{count} passes"),
                "against a student's training step": ratios(seconds, "training step")[f"{count} one pass"],
            }
            for count in num_masks
        ]
    write_report("distillation", where, settings, rows)


if __name__ == "__main__":
    auto_cli(main)
