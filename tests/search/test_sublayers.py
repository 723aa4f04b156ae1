import pytest
from torch import nn
from torchvision import models
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    MambaConfig,
    MambaModel,
    T5Config,
    T5EncoderModel,
)

from lightning_ydrop import find_places
from lightning_ydrop.search.sublayers import SUBLAYERS
from tests.search.networks import OtherBlock, Plain, bert, own_transformer, torch_encoder, vit
from tests.search.test_blocks import without_values


def modules_of(model: nn.Module, per_block: bool = False) -> dict[str, tuple[str, ...]]:
    return {name: place.modules for name, place in find_places(model, per_block).places.items()}


def test_our_own_attention_is_reached_everywhere() -> None:
    report = find_places(own_transformer(1))
    assert report.not_reached == {}
    assert list(report.places) == list(SUBLAYERS)
    assert {place.kind for place in report.places.values()} == {"token"}
    assert modules_of(own_transformer(1)) == {
        "queries": ("0.attention.query",),
        "keys": ("0.attention.key",),
        "values": ("0.attention.value",),
        "attention": ("0.attention.dropout",),
        "projection": ("0.attention.proj",),
        "residual": ("0.drop",),
        "feed_forward": ("0.hidden_drop",),
    }


def test_a_dropout_of_the_next_sublayer_is_not_the_residual_one() -> None:
    found = modules_of(nn.Sequential(OtherBlock()))
    assert found["residual"] == ("0.feed.narrow",)
    assert found["feed_forward"] == ("0.feed.wide",)


def test_bert() -> None:
    layer = "encoder.layer.0"
    assert modules_of(bert(1)) == {
        "queries": (f"{layer}.attention.self.query",),
        "keys": (f"{layer}.attention.self.key",),
        "values": (f"{layer}.attention.self.value",),
        "projection": (f"{layer}.attention.output.dense",),
        "residual": (f"{layer}.attention.output.dropout", f"{layer}.output.dropout"),
        "feed_forward": (f"{layer}.intermediate.intermediate_act_fn",),
    }
    # Transformers 5 reads the rate of the dropout, and drops in a function.
    assert find_places(bert()).not_reached == {
        "attention": "BertSelfAttention reads attributes of `dropout` and never calls it"
    }


def test_each_block_may_have_places_of_its_own() -> None:
    places = find_places(bert(3), per_block=True).places
    assert len(places) == 18
    assert places["block3.queries"].modules == ("encoder.layer.2.attention.self.query",)
    assert places["block3.queries"].why == "in encoder.layer.2"


def test_timms_vit() -> None:
    found = modules_of(vit())
    assert found["projection"] == ("blocks.0.attn.proj", "blocks.1.attn.proj")
    assert found["residual"][:2] == ("blocks.0.attn.proj_drop", "blocks.0.mlp.drop2")
    assert found["feed_forward"] == ("blocks.0.mlp.drop1", "blocks.1.mlp.drop1")
    report = find_places(vit())
    assert report.not_reached["attention"].startswith("fused attention")
    assert report.not_reached["patch_embed.proj"] == "it makes tokens of maps"
    assert {"queries", "keys", "values"} <= report.not_reached.keys()
    assert modules_of(vit(fused=False))["attention"] == ("blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop")


def test_torchs_encoder_and_decoder() -> None:
    found = modules_of(torch_encoder())
    assert found["residual"] == tuple(f"layers.{layer}.dropout{number}" for layer in (0, 1) for number in (1, 2))
    assert found["feed_forward"] == ("layers.0.dropout", "layers.1.dropout")
    assert find_places(torch_encoder()).not_reached.keys() == {"queries", "keys", "values", "attention", "projection"}
    decoder = modules_of(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True))
    assert decoder == {"residual": ("dropout1", "dropout2", "dropout3"), "feed_forward": ("dropout",)}


def test_tokens_first_are_refused() -> None:
    report = find_places(torch_encoder(batch_first=False))
    assert report.places == {}
    assert set(report.not_reached.values()) == {"its tensors are (T, B, C): build it with batch_first=True"}


def test_torchvisions_vit_and_swin() -> None:
    found = modules_of(
        models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
        )
    )
    layer = "encoder.layers.encoder_layer_0"
    assert found == {"residual": (f"{layer}.dropout", f"{layer}.mlp.4"), "feed_forward": (f"{layer}.mlp.2",)}
    swin = find_places(without_values(models.swin_t))
    assert swin.places == {}
    assert "(B, H, W, C)" in swin.not_reached["residual"]


def test_other_models_of_transformers() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"
    assert modules_of(GPT2Model(config)) == {
        "attention": ("h.0.attn.attn_dropout",),
        "projection": ("h.0.attn.c_proj",),
        "residual": ("h.0.attn.resid_dropout", "h.0.mlp.dropout"),
        "feed_forward": ("h.0.mlp.act",),
    }
    t5 = modules_of(T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)))
    assert t5["residual"] == ("encoder.block.0.layer.0.dropout", "encoder.block.0.layer.1.dropout")
    assert t5["feed_forward"] == ("encoder.block.0.layer.1.DenseReluDense.dropout",)


def test_a_dropout_that_is_never_called_is_no_matter_of_the_implementation() -> None:
    """DistilBERT reads the rate of its dropout, with eager attention too."""
    config = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=50)
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
        report = find_places(DistilBertModel(config))
        assert "attention" not in report.places
        assert "never calls it" in report.not_reached["attention"]


def test_mamba_has_no_attention() -> None:
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4)
    assert find_places(MambaModel(config)).places == {}


@pytest.mark.parametrize("per_block", [False, True])
def test_a_model_may_have_places_of_both_kinds(per_block: bool) -> None:
    places = find_places(nn.ModuleList([Plain(), own_transformer()]), per_block).places
    assert {place.kind for place in places.values()} == {"conv", "token"}
