"""
Which units matter?
===================

Measure the units of a trained network, see what accuracy is left without some of them,
and remove the weakest for good. This needs no Y-Drop: it works on any torch model.
"""

# %%
# A perceptron on scikit-learn's digits, trained in plain torch:
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_ydrop.analysis import (
    ConductanceSpread,
    mean_conductance,
    prune_units,
    removal_curve,
)
from lightning_ydrop.analysis.plots import plot_conductance, plot_removal

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
pixels, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
order = torch.randperm(len(labels))
train, test = order[:1000], order[1000:]
model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(200):
    loss = nn.functional.cross_entropy(model(pixels[train]), labels[train])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()


def accuracy():
    with torch.no_grad():
        return float((model(pixels[test]).argmax(1) == labels[test]).float().mean())


print(f"test accuracy {accuracy():.3f}")

# %%
# Conductance
# -----------
# The conductance of a unit is the part of the output's change that passes through it
# while the input moves from zeros to the sample. The mean over a data set, for two
# layers in one pass:
data = [(pixels[test], labels[test])]
means = mean_conductance(model, data, layers=["1", "3"], progress_bar=False)
for name, scores in means.items():
    spread = ConductanceSpread(len(scores))
    spread.update(scores[None])
    computed = spread.compute()
    share, gini = float(computed["top_share"]), float(computed["gini"])
    print(f"layer {name}: the top fifth holds {share:.3f} of the sum, Gini {gini:.3f}")

# %%
# Units by their mean conductance, the strongest first:
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
plot_conductance({f"layer {name}": scores for name, scores in means.items()}, axes)
plt.show()

# %%
# Removal
# -------
# How much accuracy is left without the strongest units, without random ones, and
# without the weakest?
curves = {
    "strongest first": removal_curve(
        model, data, order="conductance", layers=["1", "3"], progress_bar=False
    ),
    "random": removal_curve(
        model, data, order="random", layers=["1", "3"], progress_bar=False
    ),
    "weakest first": removal_curve(
        model,
        data,
        order={name: -scores for name, scores in means.items()},
        layers=["1", "3"],
        progress_bar=False,
    ),
}
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
plot_removal(curves, axes)
plt.show()

# %%
# Draw these curves before you prune. In this small network a tenth of the units can go
# if they are the weakest. Beyond that they are no safer to remove than random ones:
# weak on average over all classes is not the same as useless.
#
# Pruning
# -------
# A tenth of the units of the first layer, the weakest, are removed for good through
# ``torch.nn.utils.prune``. What is returned says which units are kept.
kept = prune_units(model, {"0": means["1"]}, fraction=0.1)
print({name: f"{int(mask.sum())} of {len(mask)} units" for name, mask in kept.items()})
print(f"test accuracy {accuracy():.3f}")
