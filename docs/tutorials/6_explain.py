"""
Explain a trained network of timm
=================================

Which channels carry the decision for a class, how exact that answer is, and which
pixels speak through a channel.
"""

# %%
# A small ResNet of timm learns scikit-learn's digits, without a download of weights:
import matplotlib.pyplot as plt
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_ydrop import layer_conductance, neuron_conductance

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
images = nn.functional.interpolate(images, scale_factor=4.0)
labels = torch.tensor(labels)
order = torch.randperm(len(labels))
train, test = order[:1000], order[1000:]

model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(5):
    for batch in train[torch.randperm(len(train))].split(50):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()


def accuracies(digits):
    """The accuracy on the test images of a digit, and on all others, for each digit."""
    with torch.no_grad():
        right = (model(images[test]).argmax(1) == labels[test]).float()
    masks = [labels[test] == digit for digit in digits]
    return torch.tensor([[right[mask].mean(), right[~mask].mean()] for mask in masks])


on_threes, on_others = accuracies([3])[0].tolist()
print(f"test accuracy: on 3 {on_threes:.3f}, on the others {on_others:.3f}")

# %%
# How exact is it?
# ----------------
# Conductance divides the change of a logit, from a baseline to the sample, among the
# units of a layer. A black image as the baseline asks why the network sees a digit at
# all. The average digit asks why it sees a 3 and not something else, so we start there.
#
# The convergence delta of a layer is the sum over its units minus the change of the
# logit. More steps bring it to 0 at every layer that all paths through the network
# cross, such as a whole stage of a ResNet:
average = images[train].mean(0)
threes = images[test][labels[test] == 3][:20]
with torch.no_grad():
    change = (model(threes) - model(average[None]))[:, 3]
print(f"the change of the logit: {float(change.mean()):.2f}")
for n_steps in (10, 40, 160):
    _, deltas = layer_conductance(
        model,
        threes,
        3,
        layers=["layer1", "layer2", "layer3", "layer4"],
        baseline=average,
        n_steps=n_steps,
        quadrature="trapezoid",
        return_convergence_delta=True,
    )
    sizes = [f"{name} {float(each.abs().mean()):.4f}" for name, each in deltas.items()]
    print(f"{n_steps:3} steps, mean size of delta:", ", ".join(sizes))

# %%
# At a layer inside a residual block the delta does not vanish. It shows how much passes
# beside the layer, over the skip connection:
scores, deltas = layer_conductance(
    model,
    threes,
    3,
    layers=["layer4.0.bn2", "layer4.0.downsample"],
    baseline=average,
    quadrature="trapezoid",
    return_convergence_delta=True,
)
for name, each in scores.items():
    through, delta = float(each.sum(1).mean()), float(deltas[name].mean())
    print(f"{name:20} carries {through:6.2f}, delta {delta:6.2f}")

# %%
# Which channels carry a class?
# -----------------------------
# ``classes="all"`` measures every logit from the same forward pass. A prediction
# depends on how far a logit is above the others, so we subtract the mean over all
# logits. Then we take the mean over the images of each digit, for its own logit:
some = test[:300]
scores = layer_conductance(
    model,
    images[some],
    classes="all",
    layers="layer4",
    baseline=average,
    n_steps=10,
    quadrature="trapezoid",
    max_rows=1000,
)["layer4"]
print(tuple(scores.shape), "samples, classes, channels")
above_others = scores - scores.mean(1, keepdim=True)
own = torch.stack(
    [above_others[labels[some] == digit, digit].mean(0) for digit in range(10)]
)
shown = own.amax(0).argsort(descending=True)[:40]
shown = shown[own[:, shown].argmax(0).argsort()]
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
picture = axes.imshow(own[:, shown].numpy(), aspect="auto", cmap="magma")
figure.colorbar(picture, label="conductance")
axes.set(xlabel="40 channels of layer4", ylabel="digit", yticks=range(10))
plt.show()

# %%
# Do the channels with the highest scores decide? We take the best fifth for each digit
# and give these channels the values that they have for the average digit:
values_at_average = model.forward_features(average[None]).detach()


def without(channels):
    """The accuracies with some channels of layer4 as for the average digit."""

    def replace(module, args, output):
        output = output.clone()
        output[:, channels] = values_at_average[:, channels]
        return output

    handle = model.layer4.register_forward_hook(replace)
    reached = accuracies(range(10))
    handle.remove()
    return reached


fifth = own.shape[1] // 5
at_random = [without(torch.randperm(own.shape[1])[:fifth]) for _ in range(5)]
by_chance = torch.stack(at_random).mean(0)
print("        without its channels   without random channels")
print("digit    digit     others        digit     others")
for digit in range(10):
    strongest = without(own[digit].argsort(descending=True)[:fifth])[digit]
    columns = [float(each) for each in (*strongest, *by_chance[digit])]
    print("{:5} {:8.2f} {:10.2f} {:12.2f} {:10.2f}".format(digit, *columns))
with torch.no_grad():
    print("the average digit is taken for", int(model(average[None]).argmax()))

# %%
# Without their own channels most digits are lost, and the others are recognised as
# before. An 8 is not lost: the network takes the average digit for an 8, so the
# channels of an 8 may stay as they are there.
#
# Which pixels speak through a channel?
# -------------------------------------
# ``neuron_conductance`` divides the conductance of one channel among the pixels. Its
# sum over the pixels converges to the channel's conductance:
channel = int(own[3].argmax())
measured = {"baseline": average, "n_steps": 160, "quadrature": "trapezoid"}
maps = neuron_conductance(
    model, threes[:5], 3, layer="layer4", neuron=channel, **measured
)
scores = layer_conductance(model, threes[:5], 3, layers="layer4", **measured)["layer4"]
print("sums over pixels:", [f"{float(each.sum()):.3f}" for each in maps])
print("of the channel:  ", [f"{float(each):.3f}" for each in scores[:, channel]])

# %%
# Conductance adds up, so we can add the 4 x 4 pixels that one pixel was enlarged to.
# Red pixels speak for a 3 through this channel, blue ones against it:
maps = nn.functional.avg_pool2d(maps, 4) * 16
figure, axes = plt.subplots(2, 5, figsize=(7, 3), layout="constrained")
bound = float(maps.abs().max())
for image, contribution, (above, below) in zip(threes[:5], maps, axes.T, strict=True):
    above.imshow(image[0].numpy(), cmap="gray_r")
    below.imshow(contribution[0].numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
    above.axis("off")
    below.axis("off")
plt.show()
