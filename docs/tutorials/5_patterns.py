"""
Search for dropout patterns
===========================

Look at what dropout patterns are, put them into a network, and let a search choose
them. This is AutoDropout.
"""

# %%
# Patterns
# --------
# A pattern drops parts of a feature map. Methods made by hand are points of the same
# space: here is what each drops of a map of 32 x 32, in one channel and one draw. White
# is kept.
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torchvision.models import resnet18

from lightning_ydrop import (
    ConvPattern,
    PatternDropout,
    apply_patterns,
    find_places,
    remove_patterns,
)

patterns = {
    "DropBlock": ConvPattern.dropblock(0.25, rate=0.5),
    "cutout": ConvPattern.cutout(0.4),
    "size 0.25, repeat 2": ConvPattern(size=0.25, repeat=2, share_c=True),
    "rotated and sheared": ConvPattern(
        size=0.25, repeat=2, rotate=30, shear_x=0.3, share_c=True
    ),
    "stripes": ConvPattern(size=0.1, stride=0.1, repeat=5, rotate=45, share_c=True),
}
torch.manual_seed(0)
figure, all_axes = plt.subplots(
    1, len(patterns), figsize=(10, 2.4), layout="constrained"
)
for axes, (name, pattern) in zip(all_axes, patterns.items(), strict=True):
    layer = PatternDropout(pattern)
    axes.imshow(layer(torch.ones(1, 1, 32, 32))[0, 0] != 0, cmap="gray", vmin=0, vmax=1)
    axes.set_title(name, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
plt.show()

# %%
# Places
# ------
# ``find_places`` says where patterns go in a network, and why: in a ResNet, one to each
# residual block.
model = resnet18()
print(find_places(model))

# %%
# By hand they are put there by name. In a Trainer, ``PatternCallback`` does this for
# one fit.
print(
    apply_patterns(
        model,
        {
            "stage2.1": patterns["DropBlock"],
            "stage3.1": patterns["size 0.25, repeat 2"],
        },
    )
)
print(remove_patterns(model))

# %%
# A search
# --------
# A search is a program. It trains the network of a configuration again and again with
# patterns that a controller chooses, and the controller learns from what validation
# says. Twelve short trainings, in two processes, show how it goes. A search that finds
# something takes hundreds: see :doc:`what it found </how-to/patterns>`, and that it
# need not.
root = Path.cwd().parents[1]
work = root / "runs" / "tutorial"


def program(*arguments):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "lightning_ydrop.search",
        *map(str, arguments),
    ]
    ended = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False
    )
    print(ended.stdout or ended.stderr)


storage = ("--storage", work / "study.journal")
config = ("--config", "examples/search/digits.yaml", "--trainer.max_epochs", 3)
program(
    "fit",
    *config,
    "--sampler",
    "table",
    "--trials",
    12,
    "--workers",
    2,
    *storage,
    "--out",
    work,
)

# %%
# Started again with more trials, it goes on. ``export`` retrains the best with fresh
# seeds, and writes the winner:
study = (*storage, "--study", "table-0")
program(
    "export",
    *study,
    "--top",
    2,
    "--seeds",
    2,
    "--workers",
    2,
    "--out",
    work,
    "--patterns",
    work / "patterns.yaml",
)
print((work / "patterns.yaml").read_text())

# %%
# ``plot`` draws rewards and patterns:
program("plot", *study, "--out", work)
for name in ("rewards.png", "patterns.png"):
    picture = plt.imread(work / name)
    figure = plt.figure(figsize=(8, 8 * picture.shape[0] / picture.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(picture)
    axes.axis("off")
plt.show()
