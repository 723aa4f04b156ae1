"""Networks to find places in: some of ours, some of libraries, all small and without a download."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from timm.layers.config import set_fused_attn
from torch import Tensor, nn
from torchvision import models
from transformers import BertConfig, BertModel

from examples.networks import WideResNet

Build = Callable[[], Any]


class Block(nn.Module):
    """A residual block whose shortcut is given, or is no module."""

    def __init__(self, shortcut: nn.Module | None = None, in_code: bool = False, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.3)
        self.late = nn.BatchNorm2d(width)
        self.shortcut = shortcut
        self.in_code = in_code

    def forward(self, x: Tensor) -> Tensor:
        y = self.late(self.drop(self.conv(self.bn(x))))
        if not self.in_code and self.shortcut is not None:
            x = self.shortcut(x)
        return x + y


class Nested(Block):
    """A block with an addition inside its branch."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return x + (y + self.late(self.drop(y.relu())))


class PooledInCode(nn.Module):
    """Stages of two blocks each, of one width, with pooling in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(Block(), Block()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.max_pool2d(self.first(x), 2))


class Remembering(Block):
    """A block whose forward leaves traces, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.last: Any = None
        self.count = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen.append(x)
        self.count.add_(torch.rand(()))
        return super().forward(x)


class Untraceable(Block):
    """A block that asks its input, which torch.fx can't follow."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return super().forward(x)


class Flat(nn.Module):
    """A network without blocks as modules: its forward adds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for path in self.paths:
            x = x + path(x)
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """A network with pooling in code: its widths tell the stages."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        widths = [3, 4, 4, 8]
        self.convs = nn.ModuleList(nn.Conv2d(one, other, 3, padding=1) for one, other in zip(widths, widths[1:]))  # noqa: B905, RUF007
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm else nn.GroupNorm(2, width) for width in widths[1:])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.functional.max_pool2d(norm(conv(x)).relu(), 2)
        return self.head(x.mean((2, 3)))


class SelfAttention(nn.Module):
    """Attention that calls a dropout of its weights."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.1)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.query, self.key, self.value))
        weights = self.dropout((q @ k.transpose(-1, -2)).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class OwnBlock(nn.Module):
    """A block of a Transformer, which defines its layers in another order than it calls them in."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.narrow = nn.Linear(2 * width, width)
        self.hidden_drop = nn.Dropout(0.1)
        self.wide = nn.Linear(width, 2 * width)
        self.attention = SelfAttention(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.drop(self.narrow(self.hidden_drop(self.wide(x).relu())))


class DropsFirst(nn.Module):
    """A feed-forward that drops its input, not its output."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.drop, self.wide, self.narrow = nn.Dropout(0.1), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(self.drop(x)).relu())


class OtherBlock(nn.Module):
    """A block of a Transformer without dropout of what is added."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = SelfAttention(), DropsFirst()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed(x)


def own_transformer(depth: int = 2) -> Any:
    return nn.Sequential(*(OwnBlock() for _ in range(depth)))


def bert(layers: int = 2) -> Any:
    settings: dict[str, Any] = {"attn_implementation": "eager"}
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        **settings,
    )
    return BertModel(config)


def vit(fused: bool = True) -> Any:
    set_fused_attn(fused)
    try:
        return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=12, num_classes=3, num_heads=2)
    finally:
        set_fused_attn(True)


def torch_encoder(batch_first: bool = True, **kwargs: Any) -> Any:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def wide(depth: int = 28, width: float = 2, p: float = 0.0) -> Any:
    return WideResNet(depth, width, p=p)


class Holder(LightningModule):
    """A LightningModule that holds a network in an attribute."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


IMAGES = (4, 3, 32, 32)
# Build, and an input. For each: conv networks and Transformers that must stay what they are.
PROVED: dict[str, tuple[Build, Callable[[], Any]]] = {
    "torchvision's ResNet-18": (lambda: models.resnet18(num_classes=3), lambda: torch.randn(2, 3, 64, 64)),
    "WRN-10-1": (lambda: wide(10, 0.5), lambda: torch.randn(IMAGES)),
    "timm's ResNet": (lambda: timm.create_model("resnet10t", num_classes=3), lambda: torch.randn(2, 3, 64, 64)),
    "timm's ViT": (vit, lambda: torch.randn(IMAGES)),
    "BERT": (bert, lambda: torch.randint(0, 50, (4, 7))),
    "nn.TransformerEncoder": (torch_encoder, lambda: torch.randn(4, 6, 8)),
    "our own attention": (own_transformer, lambda: torch.randn(4, 6, 8)),
    "our own block": (
        lambda: nn.Sequential(Block(), Block(nn.Identity()), Block(nn.Sequential())),
        lambda: torch.randn(4, 4, 16, 16),
    ),
}


def outputs(value: Any) -> Tensor:
    """What a model puts out, also where it is an object of Transformers."""
    result: Tensor = getattr(value, "last_hidden_state", value)
    return result
