"""What the names and layers around a dropout tell: which dimension its units are, if any, and if it follows a ReLU."""

import re
from collections.abc import Iterator

from torch import nn

from lightning_ydrop.layers.conductance_dropout import ConductanceDropout
from lightning_ydrop.layers.jumpout import Jumpout

CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
CONVERTED = (nn.Dropout, *CHANNEL_DROPOUTS)
FEATURES_LAST = (
    *(nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.Flatten),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
CHANNELS_SECOND = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
)
RELUS = (nn.ReLU, nn.ReLU6)
# What is positive where its input is, and so keeps a ReLU's activations what they are.
KEEPING_ACTIVE = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, *CONVERTED, ConductanceDropout, Jumpout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
# What drops attention weights is called so where it stands, or just dropout in a module that is called after attention
# and makes queries.
OF_ATTENTION = re.compile(r"(att|attn|attention)(_(weights?|probs?))?_?drop(out)?|drop(out)?_?(att|attn|attention)")
PLAIN_NAME = re.compile(r"drop(out)?(_layer)?")
OF_QUERIES = re.compile(r"(.*_)?w?(q|qk|qkv|query|queries)s?(_.*)?|linears")


def unit_dim_of(model: nn.Module, name: str, module: nn.Module) -> tuple[int, str]:
    """Find the dimension of the units, and say why it is that one."""
    if isinstance(module, CHANNEL_DROPOUTS):
        return 1, "its channels"
    for before, behind in _surroundings(model, name):
        for where, neighbours, closest in (("behind", before, -1), ("before", behind, 0)):
            # One neighbour after the other: each may be most of the model.
            for deciding in filter(None, map(_deciding, neighbours)):
                each = deciding[closest]
                return -1 if has_features_last(each) else 1, f"{where} {type(each).__name__}"
    return -1, "with nothing around it that tells"


def follows_relu(model: nn.Module, name: str) -> bool:
    """Tell whether what comes to a module is what a ReLU has put out."""
    for before, _ in _surroundings(model, name):
        for neighbour in before:
            leaves = [] if neighbour is None else [part for part in neighbour.modules() if not list(part.children())]
            for leaf in reversed(leaves):
                if not isinstance(leaf, KEEPING_ACTIVE):
                    return isinstance(leaf, RELUS)
    return False


def has_features_last(module: nn.Module) -> bool:
    """Tell whether units are the last dimension of a layer's output, by its kind: otherwise they are dimension 1."""
    kind = type(module).__name__
    # LayerNorm2d of torchvision and timm stands between convolutions; embeddings of patches convolve, and turn them.
    return (isinstance(module, FEATURES_LAST) and not kind.endswith("2d")) or "embed" in kind.lower()


def drops_attention_weights(holder: nn.Module, called: str) -> bool:
    """Tell from what a dropout is called, and the module that holds it."""
    if OF_ATTENTION.fullmatch(called.lower()):
        return True
    kind = type(holder).__name__.lower()
    return (
        PLAIN_NAME.fullmatch(called.lower()) is not None
        and ("attention" in kind or "attn" in kind)
        and any(OF_QUERIES.fullmatch(child) for child in holder._modules)
    )


def _surroundings(model: nn.Module, name: str) -> Iterator[tuple[list[nn.Module | None], list[nn.Module | None]]]:
    """List what stands before a module, the closest first, and what behind it: in its container, and around that."""
    path = name.split(".")
    for depth in reversed(range(len(path))):
        # Not named_children(), which passes over what the container holds a second time.
        around = model.get_submodule(".".join(path[:depth]))._modules
        position = list(around).index(path[depth])
        siblings = list(around.values())
        yield siblings[:position][::-1], siblings[position + 1 :]


def _deciding(module: nn.Module | None) -> list[nn.Module]:
    """List what tells where units are, in the order of definition."""
    if module is None:
        return []
    if isinstance(module, FEATURES_LAST + CHANNELS_SECOND) or has_features_last(module):
        return [module]
    return [part for child in module._modules.values() for part in _deciding(child)]
