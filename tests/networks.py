"""Small networks of the kinds that people put dropout into."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout

Build = Callable[[], nn.Module]


def perceptron(activation: Callable[[], nn.Module] = nn.ReLU, dropout: Build = ConductanceDropout) -> nn.Sequential:
    """Three linear layers, 12 -> 16 -> 10 -> 5, with a dropout layer before each activation ("1" and "4")."""
    return nn.Sequential(
        nn.Linear(12, 16), dropout(), activation(), nn.Linear(16, 10), dropout(), activation(), nn.Linear(10, 5)
    )


def convolutional() -> nn.Sequential:
    """Convolution, BatchNorm and pooling on (B, 2, 8, 8), with statistics that are not those of initialisation."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        ConductanceDropout(0.2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        ConductanceDropout(),
        nn.ReLU(),
        nn.Linear(8, 5),
    )
    for _ in range(20):
        model(torch.randn(16, 2, 8, 8))
    return model


class Residual(nn.Module):
    """Two residual blocks on (B, 12): no single layer but the stem is crossed by all paths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 14), ConductanceDropout(), nn.ReLU(), nn.Linear(14, 10)) for _ in range(2)
        )
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


NETWORKS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "perceptron": (perceptron, (12,)),
    "convolutional": (convolutional, (2, 8, 8)),
    "residual": (Residual, (12,)),
}


def network_and_batch(
    kind: str, dtype: torch.dtype = torch.float32, batch: int = 6
) -> tuple[nn.Module, Tensor, Tensor]:
    """Build one of NETWORKS and a batch for it, from fixed seeds."""
    build, shape = NETWORKS[kind]
    torch.manual_seed(3)
    model = build().to(dtype)
    return model, torch.randn(batch, *shape).to(dtype), torch.randint(0, 5, (batch,))


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Every module without submodules, by name."""
    return {name: module for name, module in model.named_modules() if not list(module.children())}
