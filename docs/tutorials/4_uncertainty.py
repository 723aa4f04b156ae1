"""
Uncertainty, and a student that knows it
========================================

A network with dropout stands for the average over all its masks. Ask it a thousand
times how sure it is, then teach a student to say so in one pass, and export that
student to ONNX.
"""

# %%
# The teacher: a perceptron with dropout, trained on a few of scikit-learn's digits.
import io

import lightning as L
import matplotlib.pyplot as plt
import onnx
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from lightning_ydrop import DropoutDistillation, monte_carlo
from lightning_ydrop.uncertainty import MonteCarloDivergence

# sphinx_gallery_start_ignore
import logging
import warnings

warnings.filterwarnings("ignore", ".*does not have many workers")
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", ".*defined a `validation_step`")
for name in (
    "lightning.pytorch.utilities.rank_zero",
    "torch.onnx",
    "onnx_ir",
    "onnxscript",
):
    logging.getLogger(name).setLevel(logging.ERROR)
# sphinx_gallery_end_ignore

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
pixels, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
order = torch.randperm(len(labels))
train, test = order[:500], order[500:]
teacher = nn.Sequential(
    *(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5)),
    *(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5)),
    nn.Linear(256, 10),
)
optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)
for _ in range(200):
    loss = nn.functional.cross_entropy(teacher(pixels[train]), labels[train])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# A thousand masks
# ----------------
# ``monte_carlo`` averages the predicted probabilities over masks, in a few large
# passes. The entropy of the average tells how unsure the network is. Are its mistakes
# where it is unsure?
average = monte_carlo(teacher, pixels[test], num_samples=1000, progress_bar=False)
is_wrong = average.probabilities.argmax(1) != labels[test]
print(f"{int(is_wrong.sum())} of {len(test)} test digits are classified wrongly")

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
bins = torch.linspace(0, float(average.entropy.max()), 25).tolist()
for name, part in (("right", ~is_wrong), ("wrong", is_wrong)):
    axes.hist(
        average.entropy[part],
        bins=bins,
        density=True,
        alpha=0.6,
        label=f"classified {name}",
    )
axes.set(xlabel="entropy of the average prediction (nats)", ylabel="density")
axes.legend()
plt.show()

# %%
# A student
# ---------
# The student starts as a copy of the teacher, without dropout. It learns from the
# teacher's answers alone, so unlabelled inputs will do.
distillation = DropoutDistillation(teacher, num_masks=4)
trainer = L.Trainer(
    max_epochs=60,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(distillation, DataLoader(pixels[train], 50, shuffle=True))
student = distillation.student.eval()

# %%
# How far from the average are one pass of the teacher in evaluation mode, one pass of
# the student, and ten masks?
teacher.eval()
with torch.no_grad():
    answers = {
        "teacher, one pass": teacher(pixels[test]),
        "student, one pass": student(pixels[test]),
        "teacher, ten masks": monte_carlo(
            teacher, pixels[test], num_samples=10, progress_bar=False
        ).probabilities.log(),
    }
for name, logits in answers.items():
    divergence = MonteCarloDivergence()
    divergence.update(logits, average)
    accuracy = float((logits.argmax(1) == labels[test]).float().mean())
    distance = 1000 * divergence.compute()
    print(f"{name:20} divergence {distance:6.2f} e-3 nats, accuracy {accuracy:.3f}")

# %%
# Export
# ------
# The student is an ordinary module of the teacher's class, in evaluation mode: it
# exports as any other.
file = io.BytesIO()
program = torch.onnx.export(
    student,
    (pixels[test][:1],),
    dynamic_shapes=({0: torch.export.Dim("batch")},),
    verbose=False,
)
program.save(file)
graph = onnx.load_from_string(file.getvalue()).graph
print([node.op_type for node in graph.node])
