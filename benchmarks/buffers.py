"""What buffers cost phase 1 that it does not write to: time and memory of a step with 400 MB of them, against none."""

import resource
import sys
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.measuring import interleaved, quartiles, ratios
from benchmarks.report import write_report
from lightning_ydrop import ConductanceDropout, YDrop

MIB = 2**20


class Bank(nn.Module):
    """A perceptron beside a table that its forward reads a row of, as of a memory bank or of quantised weights."""

    bank: Tensor

    def __init__(self, mib: int, width: int, classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(max(1, mib * MIB // 4 // width), width))
        hidden = (nn.Linear(width, width), ConductanceDropout(), nn.ReLU())
        self.body = nn.Sequential(*hidden, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits."""
        logits: Tensor = self.body(x + self.bank[0])
        return logits


def main(mib: int = 400, width: int = 256, batch_size: int = 64, rounds: int = 300, threads: int = 1) -> None:
    """Measure steps of the engine.

    Args:
        mib: Size of the buffer.
        width: Of the network.
        batch_size: Samples in the batch.
        rounds: How many steps of each are timed.
        threads: Of the CPU.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    x, y = torch.randn(batch_size, width), torch.randint(10, (batch_size,))
    # The small one first: what the process has taken at its peak only grows.
    engines = {name: YDrop(Bank(size, width)) for name, size in (("none", 0), ("buffers", mib))}
    rise = {}
    for name, engine in engines.items():
        before = _peak_mib()
        for _ in range(5):  # the dry run among them
            engine.step(x, y)
        rise[name] = _peak_mib() - before
    seconds = interleaved(
        {name: lambda engine=engine: engine.step(x, y) for name, engine in engines.items()},  # type: ignore[misc]
        rounds=rounds,
        device=torch.device("cpu"),
    )
    low, high = quartiles(seconds, "buffers", "none")
    row: dict[str, Any] = {
        "buffers MiB": mib,
        "time, ratio to none": ratios(seconds, "none")["buffers"],
        "quartiles of the ratio": f"{low:.2f} to {high:.2f}",
        "peak grows by MiB": rise["buffers"],
    }
    write_report("buffers", torch.device("cpu"), settings, [row])


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    auto_cli(main)
