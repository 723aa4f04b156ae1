"""Networks of other libraries, as these make them: converted, and trained with Y-Drop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import transformers
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ydrop import KeyAdapter, TargetLogit, YDropCallback, restore_dropout
from tests.callbacks.test_ydrop import trainer_of

WIDTH, BATCH_SIZE = 32, 8
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 3,
}
Batch = dict[str, Tensor]


class Texts(Dataset[Batch]):
    """Batches of tokens, each of another length, as a tokenizer that pads gives them."""

    def __init__(self, *, labels_of_tokens: bool = False) -> None:
        self.labels_of_tokens = labels_of_tokens

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Batch:
        chance = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, 100, (BATCH_SIZE, 5 + index), generator=chance)
        labels = tokens.clone() if self.labels_of_tokens else torch.randint(3, (BATCH_SIZE,), generator=chance)
        if self.labels_of_tokens:
            labels[:, 3:] = -100  # what Transformers leaves out of the loss
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class Images(Texts):
    """Batches of images, by the names that Transformers gives them."""

    def __getitem__(self, index: int) -> Batch:
        chance = torch.Generator().manual_seed(index)
        images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=chance)
        return {"pixel_values": images, "labels": super().__getitem__(index)["labels"]}


class Wrapper(LightningModule):
    """What is written around a network of a library."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class OfTransformers(Wrapper):
    """Around one of Transformers, which computes the loss itself."""

    def forward(self, **inputs: Tensor) -> Any:
        return self.network(**inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss


class OfTimm(Wrapper):
    """Around one of timm."""

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["pixel_values"]), batch["labels"])


@dataclass
class Case:
    """A network, its data, what the callback is told, and the layers that are driven: by name, their units."""

    build: Callable[[], nn.Module]
    units: dict[str, int]
    module: type[Wrapper] = OfTransformers
    data: Dataset[Batch] = field(default_factory=Texts)
    settings: dict[str, Any] = field(default_factory=dict)


def tokens(embedding: str, **settings: Any) -> dict[str, Any]:
    adapter = KeyAdapter(inputs=["input_ids", "attention_mask"], target="labels", keywords=True)
    return {"interpolate_at": f"network.{embedding}", "adapter": adapter, **settings}


def bert(attention: str) -> nn.Module:
    config = transformers.BertConfig(vocab_size=100, **SIZES | {"attn_implementation": attention})
    return transformers.BertForSequenceClassification(config)


def blocks(name: str, units: Mapping[str, int]) -> dict[str, int]:
    """The layers of both blocks."""
    return {f"{name}.{block}.{layer}": size for block in (0, 1) for layer, size in units.items()}


BERTS_UNITS = {
    "bert.embeddings.dropout": WIDTH,
    **blocks("bert.encoder.layer", {"attention.output.dropout": WIDTH, "output.dropout": WIDTH}),
    "dropout": WIDTH,
}
CASES = {
    "BERT": Case(lambda: bert("sdpa"), BERTS_UNITS, settings=tokens("bert.embeddings.word_embeddings")),
    "BERT, eager attention": Case(
        lambda: bert("eager"), BERTS_UNITS, settings=tokens("bert.embeddings.word_embeddings")
    ),
    "GPT-2": Case(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=100, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
            )
        ),
        {"transformer.drop": WIDTH} | blocks("transformer.h", {"attn.resid_dropout": WIDTH, "mlp.dropout": WIDTH}),
        data=Texts(labels_of_tokens=True),
        settings=tokens("transformer.wte", objective=TargetLogit(class_dim=-1)),
    ),
    "ViT of Transformers": Case(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, hidden_dropout_prob=0.1)
        ),
        {"vit.embeddings.dropout": WIDTH} | blocks("vit.layers", {"dropout": WIDTH}),
        data=Images(),
        settings={"adapter": KeyAdapter(inputs=["pixel_values"], target="labels", keywords=True)},
    ),
    "ViT of timm": Case(
        lambda: timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            depth=2,
            num_classes=3,
            drop_rate=0.1,
            pos_drop_rate=0.1,
            proj_drop_rate=0.1,
        ),
        {"pos_drop": 192, "head_drop": 192}
        | blocks("blocks", {"attn.proj_drop": 192, "mlp.drop1": 768, "mlp.drop2": 192}),
        module=OfTimm,
        data=Images(),
        settings={"adapter": KeyAdapter(inputs="pixel_values", target="labels")},
    ),
    "ConvNeXt of timm": Case(
        lambda: timm.create_model("convnext_atto", num_classes=3, drop_rate=0.2),
        {"head.drop": 320},
        module=OfTimm,
        data=Images(),
        settings={"adapter": KeyAdapter(inputs="pixel_values", target="labels"), "include": "*.head.*"},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_layer_of_features_is_driven(case: Case) -> None:
    seed_everything(0, verbose=False)
    network = case.build()
    before = {name: type(module) for name, module in network.named_modules()}
    callback = YDropCallback(annealing_epochs=1, convert=True, **case.settings)
    trainer_of(callback, max_epochs=2).fit(case.module(network), DataLoader(case.data, batch_size=None))
    assert callback.engine is not None
    layers = {name.removeprefix("network."): layer for name, layer in callback.engine.layers.items()}
    assert {name: len(layer.drop_prob) for name, layer in layers.items()} == case.units
    assert all(len(layer.drop_prob.unique()) == 2 for layer in layers.values())
    assert callback.engine.nonfinite == 0
    restore_dropout(network)
    assert {name: type(module) for name, module in network.named_modules()} == before
