"""
Y-Drop on digits
================

Train a network on scikit-learn's digits with ``nn.Dropout`` and with Y-Drop, and look
at what the callback did.
"""

# %%
# The network is an ordinary LightningModule. Nothing in it knows of Y-Drop.
import lightning as L
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import YDropCallback

# sphinx_gallery_start_ignore
import logging
import warnings

warnings.filterwarnings("ignore", ".*does not have many workers")
warnings.filterwarnings("ignore", category=FutureWarning)


class Printed(logging.Handler):
    def emit(self, record):
        if (
            "rop" in record.getMessage()
        ):  # what the callback says, and not what Lightning says of the machine
            print(record.getMessage())


logging.getLogger("lightning.pytorch").handlers = [Printed()]
# sphinx_gallery_end_ignore

images, labels = load_digits(return_X_y=True)
pixels, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train_set, val_set = (
    TensorDataset(pixels[part], labels[part]) for part in (order[:700], order[700:])
)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(64, 1024), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(1024, 10),
        )
        self.accuracies = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.accuracies.append(
            float((self(batch[0]).argmax(1) == batch[1]).float().mean())
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


# %%
# One function trains with and without the callback, from the same weights and on the
# same batches. With ``convert=True`` the callback puts its layers where ``nn.Dropout``
# stands. For ``annealing_epochs`` they are ordinary dropout, so the first epochs of
# both trainings are alike.


def fitted(*callbacks):
    L.seed_everything(1, verbose=False)
    model = Net()
    trainer = L.Trainer(
        max_epochs=30,
        accelerator="cpu",
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        model,
        DataLoader(train_set, 32, shuffle=True),
        DataLoader(val_set, len(val_set)),
    )
    return model


dropout = fitted()
ydrop = fitted(YDropCallback(convert=True))

# %%
# The log says what the callback read of the first batch, which layers it drives, and
# which rates are to come. If one of these lines surprises you, something was read
# wrongly.
#
# Validation accuracy of both, on the digits that were not trained on:
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, model in (("nn.Dropout", dropout), ("Y-Drop", ydrop)):
    axes.plot(
        range(1, 31), [100 * accuracy for accuracy in model.accuracies], label=name
    )
axes.axvline(2, color="0.6", linestyle=":", label="annealing ends")
axes.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(85, 99))
axes.legend()
plt.show()

# %%
# One training of each proves nothing: another seed may turn the picture round. The
# :doc:`evidence </explanation/evidence>` has five seeds of each, controls, and
# intervals.
#
# What the callback did to the network shows in its layers. Each unit has its own
# running mean of the rate:
print(ydrop.net)

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for index in (2, 5):
    axes.hist(
        ydrop.net[index].mean_drop_prob.cpu(),
        bins=30,
        alpha=0.6,
        label=f"layer net.{index}",
    )
axes.axvline(0.5, color="0.6", linestyle=":", label="nn.Dropout(0.5)")
axes.set(xlabel="running mean of the drop rate", ylabel="units")
axes.legend()
plt.show()

# %%
# Units near 0.64 were in the important half in nearly every batch, units near 0.14 in
# nearly none. The weights themselves load into the network with ``nn.Dropout``, as if
# Y-Drop had never been there:
plain = Net()
print(plain.load_state_dict(ydrop.state_dict()))
