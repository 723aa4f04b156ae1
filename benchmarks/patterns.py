"""What dropout of a pattern costs by itself, forward and backward: PatternDropout against torch's and torchvision's.

A ratio above 1 says that the row's layer is slower than F.dropout. Also the bytes that each keeps for the backward
pass, per element.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor
from torchvision.ops import drop_block2d

from benchmarks.mask import bytes_kept, forward_and_backward
from benchmarks.measuring import interleaved, quartiles, ratios
from benchmarks.report import write_report
from lightning_ydrop import ConvPattern, PatternDropout, TokenPattern

MAPS = ((64, 64, 32, 32), (64, 256, 8, 8))
TOKENS = ((64, 128, 256),)
PATTERNS = {
    "per channel": ConvPattern(size=1 / 4, repeat=2, rotate=22.5),
    "shared": ConvPattern(size=1 / 4, repeat=2, rotate=22.5, share_c=True),
    "DropBlock": ConvPattern.dropblock(1 / 4, rate=0.5),
    "SpatialDropout": ConvPattern.spatial_dropout(0.5),
    "stochastic depth": ConvPattern.stochastic_depth(0.5),
}
TOKEN_PATTERNS = {
    "runs": TokenPattern(4, stride=4, rate=0.5),
    "shared runs": TokenPattern(4, stride=4, share_t=True, share_c=True, rate=0.5),
    "plain": TokenPattern.dropout(0.5),
    "variational": TokenPattern.variational_dropout(0.5),
    "words": TokenPattern.word_dropout(0.5),
}


def main(
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 30,
    maps: Sequence[Sequence[int]] = MAPS,
    tokens: Sequence[Sequence[int]] = TOKENS,
    compiled: bool = True,
    seed: int = 0,
) -> None:
    """Measure every shape, eager and compiled.

    Args:
        device: Where.
        threads: Of the CPU.
        rounds: How often each alternative is timed.
        maps: Shapes of feature maps, with even sides.
        tokens: Shapes of token sequences.
        compiled: Whether to compile each layer too, which needs a compiler.
        seed: Of activations.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    where = torch.device(device)
    rows = []
    for shape in (*maps, *tokens):
        is_map = len(shape) == 4
        layers: dict[str, Callable[[Tensor], Tensor]] = {"F.dropout": lambda x: F.dropout(x, 0.5)}
        if is_map:
            block = shape[2] // 4 + 1 - shape[2] // 4 % 2  # torchvision takes odd blocks alone
            layers["F.dropout2d"] = lambda x: F.dropout2d(x, 0.5)
            layers["drop_block2d"] = lambda x, block=block: drop_block2d(x, 0.1, block)  # type: ignore[misc]
        ours = PATTERNS if is_map else TOKEN_PATTERNS
        layers |= {name: PatternDropout(pattern).to(where) for name, pattern in ours.items()}
        x = torch.randn(*shape, device=where, requires_grad=True)
        steps = {name: forward_and_backward(layer, x) for name, layer in layers.items()}
        if compiled:
            steps |= {
                f"compiled {name}": forward_and_backward(torch.compile(layer, dynamic=False), x)
                for name, layer in layers.items()
            }
        seconds = interleaved(steps, rounds=rounds, device=where)
        for name, layer in layers.items():
            row = {
                "shape": tuple(shape),
                "layer": name,
                "ms": 1e3 * statistics.median(seconds[name]),
                "against F.dropout": ratios(seconds, "F.dropout")[name],
                "quartiles": quartiles(seconds, name, "F.dropout"),
            }
            if compiled:
                row["compiled"] = ratios(seconds, "compiled F.dropout")[f"compiled {name}"]
                row["compiled quartiles"] = quartiles(seconds, f"compiled {name}", "compiled F.dropout")
            rows.append({**row, "bytes kept": bytes_kept(layer, x) / x.numel()})
    write_report("patterns", where, settings, rows)


if __name__ == "__main__":
    auto_cli(main)
