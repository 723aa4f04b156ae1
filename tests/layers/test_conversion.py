import copy
import io
import sys
import warnings
from collections import UserDict, UserList
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision import models
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import StochasticDepth

from lightning_ydrop import (
    Buckets,
    ConductanceDropout,
    ConfigurationError,
    ConversionReport,
    Jumpout,
    YDrop,
    convert_dropout,
    restore_dropout,
)

Build = Callable[[], nn.Module]


class HouseDropout(nn.Dropout):
    """A subclass, which may drop in a way of its own."""


class Thinning(nn.Dropout):
    """Another, whose name does not say that it drops."""


def conv_net() -> nn.Sequential:
    """Dropout2d behind a convolution, Dropout behind its activation, and another behind features."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Dropout2d(0.3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(8, 3),
    )


def small_vit() -> nn.Module:
    """Torchvision's, on (B, 3, 16, 16), with a head that is not zero: it would leave nothing to measure."""
    vit = models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=5
    )
    nn.init.normal_(vit.heads.head.weight)
    return vit


def alexnet_classifier() -> nn.Module:
    """The part of AlexNet that drops, at its real width, on (B, 9216)."""
    return models.alexnet(num_classes=3).classifier


RUNNABLE: dict[str, tuple[Build, tuple[int, ...]]] = {
    "alexnet_classifier": (alexnet_classifier, (4, 9216)),
    "conv_net": (conv_net, (4, 2, 6, 6)),
    "small_vit": (small_vit, (4, 3, 16, 16)),
}


def without_values(build: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
    """Build a large network where it costs nothing."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialising nothing
        return build(**kwargs)


def layers_of(model: nn.Module) -> dict[str, ConductanceDropout]:
    """Every ConductanceDropout, by every name that it has."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, ConductanceDropout)}


def dims_of(model: nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (layer.unit_dim, layer.elementwise) for name, layer in layers_of(model).items()}


def same_seed(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(11)
    y: Tensor = model(x)
    return y


@pytest.mark.parametrize(
    ("build", "kwargs", "expected"),
    [
        (models.alexnet, {}, {"classifier.0": -1, "classifier.3": -1}),
        (models.vgg11, {}, {"classifier.2": -1, "classifier.5": -1}),
        (models.mobilenet_v3_small, {}, {"classifier.2": -1}),
        (models.googlenet, {"init_weights": False}, {"aux1.dropout": -1, "aux2.dropout": -1, "dropout": 1}),
        # It classifies by a convolution, so its dropout stands between feature maps.
        (models.squeezenet1_1, {}, {"classifier.0": 1}),
        (models.segmentation.fcn_resnet50, {"weights_backbone": None}, {"classifier.3": 1}),
        (models.resnet18, {}, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_networks_of_torchvision_convert(
    build: Callable[..., nn.Module], kwargs: dict[str, Any], expected: dict[str, int]
) -> None:
    model = without_values(build, **kwargs)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    report = convert_dropout(model)
    assert dims_of(model) == {name: (dim, True) for name, dim in expected.items()}
    assert list(report.converted) == list(expected)
    assert report.left == {}
    assert {name: layer.p for name, layer in layers_of(model).items()} == rates
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())


@pytest.mark.parametrize(
    ("build", "count"),
    # Three in each of 12 blocks, and one behind the positions; two in each of swin's 2 + 2 + 6 + 2 blocks.
    [(models.vit_b_16, 37), (models.swin_t, 24)],
)
def test_transformers_have_their_features_last(build: Callable[..., nn.Module], count: int) -> None:
    model = without_values(build)
    drops = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    report = convert_dropout(model)
    assert len(drops) == count
    assert dims_of(model) == dict.fromkeys(drops, (-1, True))
    assert list(report.converted) == drops


def test_units_lie_where_the_layers_around_put_them() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 8, batch_first=True)
            self.drop = nn.Dropout(0.4)
            self.alone = nn.Sequential(nn.Dropout())

    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            "tagger": Tagger(),
            "embedded": nn.Sequential(nn.Embedding(9, 4), nn.Dropout()),
            "maps": nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Dropout()),
            "flat": nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Dropout(), nn.Linear(4, 2)),
            "first": nn.Sequential(nn.Dropout(), nn.Conv1d(2, 4, 3)),
            "channels": nn.Sequential(nn.Linear(2, 2), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d()),
        }
    )
    report = convert_dropout(model)
    dims = dims_of(model)
    assert dims == {
        **dict.fromkeys(["encoder.dropout", "encoder.dropout1", "encoder.dropout2"], (-1, True)),
        **dict.fromkeys(["tagger.drop", "tagger.alone.0", "embedded.1"], (-1, True)),
        "maps.2": (1, True),
        "flat.2": (-1, True),
        "first.0": (1, True),
        **dict.fromkeys(["channels.1", "channels.2", "channels.3"], (1, False)),
    }
    reasons = {name: change.rpartition(", ")[2] for name, change in report.converted.items()}
    assert reasons["tagger.drop"] == reasons["tagger.alone.0"] == "behind LSTM"
    assert reasons["embedded.1"] == "behind Embedding"
    assert reasons["maps.2"] == "behind Conv2d"
    assert reasons["flat.2"] == "behind Flatten"
    assert reasons["first.0"] == "before Conv1d"
    assert reasons["channels.2"] == "its channels"


@pytest.mark.parametrize(
    "kind",
    [
        *(nn.SyncBatchNorm, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
        *(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
    ],
)
def test_rarer_layers_between_feature_maps_tell_too(kind: type[nn.Module]) -> None:
    arguments = {nn.SyncBatchNorm: (4,), nn.FractionalMaxPool2d: (2, 2), nn.FractionalMaxPool3d: (2, 2)}
    if "LPPool" in kind.__name__:
        arguments[kind] = (2, 2)
    model = nn.Sequential(nn.Linear(4, 4), kind(*arguments.get(kind, (2,))), nn.Dropout())
    report = convert_dropout(model)
    assert report.converted["2"].endswith(f", behind {kind.__name__}")
    assert dims_of(model) == {"2": (1, True)}


def test_a_neighbour_that_stands_there_twice_tells_at_both_places() -> None:
    conv = nn.Conv2d(4, 4, 3)
    model = nn.Sequential(
        nn.Sequential(conv, nn.LayerNorm(4), conv, nn.Dropout()),
        nn.Sequential(nn.Sequential(conv, nn.LayerNorm(4), conv), nn.Dropout()),
        nn.Sequential(nn.Dropout(), conv, conv),
    )
    convert_dropout(model)
    assert dims_of(model) == dict.fromkeys(["0.3", "1.1", "2.0"], (1, True))


class Holding(nn.Module):
    """Holds modules by name, and reshapes as it likes."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class PatchEmbed(Holding):
    """Convolves patches, and puts their features last."""


class SelfAttention(Holding):
    """Drops attention weights."""


class WindowAttn(SelfAttention):
    """The same."""


@pytest.mark.parametrize(
    "model",
    [
        Holding(embedding=PatchEmbed(convolution=nn.Conv2d(3, 8, 4), norm=nn.Identity()), drop=nn.Dropout()),
        Holding(stem=nn.Sequential(PatchEmbed(convolution=nn.Conv2d(3, 8, 4))), drop=nn.Dropout()),
    ],
    ids=["beside", "in a stem"],
)
def test_embeddings_of_patches_have_their_features_last(model: nn.Module) -> None:
    assert convert_dropout(model).converted["drop"].endswith(", behind PatchEmbed")
    assert dims_of(model) == {"drop": (-1, True)}


def test_norms_between_convolutions_have_their_channels_second() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4), LayerNorm2d(8), nn.Dropout())
    assert convert_dropout(model).converted["2"].endswith(", behind LayerNorm2d")
    assert dims_of(model) == {"2": (1, True)}


@pytest.mark.parametrize(
    ("holder", "name", "is_left"),
    [
        *((Holding, name, True) for name in ("attn_drop", "attn_dropout", "att_dropout", "attention_dropout")),
        *((Holding, name, True) for name in ("attn_probs_drop", "dropout_att", "drop_attn", "attnDrop")),
        *(
            (holder, name, True)
            for holder in (SelfAttention, WindowAttn)
            for name in ("dropout", "drop", "dropout_layer")
        ),
        *((SelfAttention, name, False) for name in ("resid_dropout", "proj_drop", "output_dropout", "drop1")),
        *((Holding, name, False) for name in ("dropout", "attn_out_drop", "pattern_drop")),
    ],
)
def test_what_drops_attention_weights_is_left(holder: type[Holding], name: str, is_left: bool) -> None:
    model = nn.Sequential(holder(query=nn.Linear(4, 4), **{name: nn.Dropout()}), nn.Linear(4, 4), nn.Dropout())
    report = convert_dropout(model)
    assert (f"0.{name}" in report.left) is is_left
    assert (type(model[0].get_submodule(name)) is nn.Dropout) is is_left
    assert "2" in report.converted


@pytest.mark.parametrize(
    "name", ["query", "q", "q_lin", "query_proj", "to_q", "to_qkv", "linear_q", "wq", "w_qs", "linears"]
)
def test_attention_is_told_by_its_queries(name: str) -> None:
    assert convert_dropout(SelfAttention(**{name: nn.Linear(4, 4)}, dropout=nn.Dropout())).left.keys() == {"dropout"}


@pytest.mark.parametrize(
    "holder", [SelfAttention(inner=nn.MultiheadAttention(4, 2)), SelfAttention(score=nn.Linear(4, 1))]
)
def test_a_network_that_is_called_after_attention_drops_features(holder: nn.Module) -> None:
    holder.add_module("dropout", nn.Dropout())
    assert convert_dropout(holder).converted.keys() == {"dropout"}


def test_attention_weights_are_told_by_any_name_of_the_instance_and_features_by_the_caller() -> None:
    shared = nn.Dropout()
    attention = SelfAttention(query=nn.Linear(4, 4), dropout=shared)
    model = Holding(project=nn.Linear(4, 4), out=shared, attention=attention)
    reason = "it drops attention weights, by its name; pass its unit_dim if these are features"
    assert convert_dropout(model) == ConversionReport({}, {"out": reason, "attention.dropout": reason})
    assert convert_dropout(model, unit_dim={"attention.*": -1}).converted.keys() == {"out", "attention.dropout"}
    assert dims_of(model) == dict.fromkeys(("out", "attention.dropout"), (-1, True))


def test_a_report_says_which_rates_are_to_come() -> None:
    rates = (0.5, 0, 0.1, 0.5)
    model = nn.Sequential(*(layer for p in rates for layer in (nn.Linear(4, 4), nn.Dropout(p))))
    report = convert_dropout(model)
    assert set(report.rates) == set(rates)
    assert report.rates[0.5] == (Buckets().low.expected, Buckets().high.expected)
    assert (
        "\nLayers of p=0 drop nothing with Y-Drop either, unless it is given buckets=Buckets()."
        "\nY-Drop turns p=0.1 into about 0.03 and 0.13 by importance."
        "\nY-Drop turns p=0.5 into about 0.14 and 0.64 by importance.\n"
    ) in str(report)


def test_with_nothing_around_it_the_units_are_last() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout())
    assert convert_dropout(model).converted["1"].endswith(", with nothing around it that tells")
    assert dims_of(model) == {"1": (-1, True)}


@pytest.mark.parametrize("kind", RUNNABLE)
def test_undriven_it_trains_and_evaluates_as_the_original(kind: str) -> None:
    build, shape = RUNNABLE[kind]
    original, x = build(), torch.randn(shape)
    converted = copy.deepcopy(original)
    assert len(convert_dropout(converted).converted) >= 2
    trained, evaluated = same_seed(original, x), original.eval()(x)
    assert torch.equal(same_seed(converted, x), trained)
    assert torch.equal(converted.eval()(x), evaluated)
    assert not torch.equal(trained, evaluated)


@pytest.mark.parametrize("kind", RUNNABLE)
def test_the_state_dict_stays_what_it_was(kind: str) -> None:
    build, _ = RUNNABLE[kind]
    original, converted = build(), build()
    convert_dropout(converted)
    assert list(converted.state_dict()) == list(original.state_dict())
    converted.load_state_dict(original.state_dict(), strict=True)
    for one, other in zip(original.parameters(), converted.parameters(), strict=True):
        assert torch.equal(one, other)
    original.load_state_dict(converted.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("kind", "units"),
    [
        ("alexnet_classifier", {"0": 9216, "3": 4096}),
        ("conv_net", {"1": 4, "5": 6, "10": 8}),
        (
            "small_vit",
            {"encoder.dropout": 16}
            | {
                f"encoder.layers.encoder_layer_{block}.{name}": size
                for block in (0, 1)
                for name, size in (("dropout", 16), ("mlp.2", 32), ("mlp.4", 16))
            },
        ),
    ],
)
def test_the_engine_drives_every_layer(kind: str, units: dict[str, int]) -> None:
    build, shape = RUNNABLE[kind]
    model, x = build(), torch.randn(shape)
    convert_dropout(model)
    engine = YDrop(model, n_steps=2)
    engine.step(x, torch.arange(len(x)) % 3)
    assert {name: len(scores) for name, scores in engine.scores.items()} == units
    assert {name: len(layer.drop_prob) for name, layer in layers_of(model).items()} == units
    assert all(layer.active for layer in layers_of(model).values())
    assert all(len(layer.drop_prob.unique()) == 2 for layer in layers_of(model).values())
    # Where probabilities differ between units, the masks are no longer those of vanilla dropout.
    driven = same_seed(model, x)
    engine.deactivate()
    assert not torch.equal(same_seed(model, x), driven)


def test_rates_and_modes_are_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.Dropout(0.25).eval(), nn.Dropout2d(0.75))
    convert_dropout(model)
    assert [(layer.p, layer.training) for layer in layers_of(model).values()] == [
        (0.0, True),
        (0.25, False),
        (0.75, True),
    ]


def test_an_instance_at_several_places_stays_one() -> None:
    drop = nn.Dropout(0.3)
    model = nn.Sequential(nn.Linear(4, 4), drop, nn.Linear(4, 4), nn.Sequential(nn.ReLU(), drop))
    report = convert_dropout(model)
    assert list(report.converted) == ["1", "3.1"]
    assert isinstance(model[1], ConductanceDropout)
    assert model[1] is model.get_submodule("3.1")
    assert list(restore_dropout(model).converted) == ["1", "3.1"]
    assert all(model.get_submodule(name) is drop for name in ("1", "3.1"))


@pytest.mark.parametrize(
    ("arguments", "converted", "left", "dim"),
    [
        ({"include": "1"}, ["1", "3.1"], {}, -1),
        ({"include": "3.*"}, ["1", "3.1"], {}, -1),
        ({"exclude": "1"}, [], {"1": "excluded", "3.1": "excluded"}, None),
        ({"exclude": "3.*"}, [], {"1": "excluded", "3.1": "excluded"}, None),
        ({"unit_dim": {"1": 1}}, ["1", "3.1"], {}, 1),
        ({"unit_dim": {"3.*": 1}}, ["1", "3.1"], {}, 1),
    ],
)
def test_a_pattern_that_fits_one_name_of_an_instance_fits_it_at_all(
    arguments: dict[str, Any], converted: list[str], left: dict[str, str], dim: int | None
) -> None:
    drop = nn.Dropout(0.3)
    model = nn.Sequential(nn.Linear(4, 4), drop, nn.Linear(4, 4), nn.Sequential(nn.ReLU(), drop))
    report = convert_dropout(model, **arguments)
    assert dims_of(model) == dict.fromkeys(converted, (dim, True))
    assert list(report.converted) == converted
    assert report.left == left
    assert model[1] is model.get_submodule("3.1")


@pytest.mark.parametrize(
    ("arguments", "converted", "left"),
    [
        ({"include": "5"}, ["5"], {"1": "not included", "10": "not included"}),
        ({"include": ["1*"]}, ["1", "10"], {"5": "not included"}),
        ({"include": []}, [], dict.fromkeys(["1", "5", "10"], "not included")),
        ({"exclude": "1*"}, ["5"], {"1": "excluded", "10": "excluded"}),
        ({"exclude": ["1", "5"]}, ["10"], {"1": "excluded", "5": "excluded"}),
        ({"include": ["1", "5"], "exclude": "5"}, ["1"], {"5": "excluded", "10": "not included"}),
    ],
)
def test_patterns_choose(arguments: dict[str, Any], converted: list[str], left: dict[str, str]) -> None:
    model = conv_net()
    report = convert_dropout(model, **arguments)
    assert list(report.converted) == list(layers_of(model)) == converted
    assert report.left == left


def test_unit_dims_are_as_told_by_the_first_pattern_that_fits() -> None:
    model = conv_net()
    report = convert_dropout(model, unit_dim={"5": -2, "[5-9]": 3, "10": 1})
    assert dims_of(model) == {"1": (1, False), "5": (-2, True), "10": (1, True)}
    assert report.converted["5"].endswith(", as told")
    assert report.converted["10"].endswith(", as told")
    assert report.converted["1"].endswith(", its channels")


def test_channel_dropout_stays_as_it_was_whatever_unit_dim_says() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout2d(), nn.Dropout())
    convert_dropout(model, unit_dim={"*": -1})
    assert dims_of(model) == {"1": (1, False), "2": (-1, True)}


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        ({"include": "head.*"}, 'include="1"'),
        ({"exclude": ["5", "head.*"]}, 'exclude="1"'),
        ({"unit_dim": {"head.*": 1}}, 'unit_dim={"1": -1}'),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_before_anything_changes(
    arguments: dict[str, Any], example: str
) -> None:
    model = conv_net()
    with pytest.raises(ConfigurationError) as caught:
        convert_dropout(model, **arguments)
    assert str(caught.value) == (
        "The pattern 'head.*' was given to convert Sequential. "
        "A pattern fits the name of a module; those that drop are 1 (Dropout2d), 5 (Dropout), 10 (Dropout). "
        f"Pass, for example, {example}."
    )
    assert layers_of(model) == {}


@pytest.mark.parametrize("include", ["0", ["1", "0"]])
def test_a_pattern_to_include_has_to_fit_something_that_drops(include: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Sequential(nn.AlphaDropout()))
    with pytest.raises(ConfigurationError) as caught:
        convert_dropout(model, include=include)
    assert str(caught.value) == (
        "The pattern '0' was given to convert Sequential. "
        "A pattern to include fits the name of a module that drops; those that drop are "
        "1 (Dropout), 2.0 (AlphaDropout). "
        'Pass, for example, include="1".'
    )
    assert layers_of(model) == {}


def test_where_nothing_drops_no_pattern_to_include_fits() -> None:
    with pytest.raises(ConfigurationError, match="those that drop are none"):
        convert_dropout(nn.Sequential(nn.Linear(4, 4)), include="*")


def test_a_second_call_may_include_what_the_first_converted() -> None:
    model = conv_net()
    assert list(convert_dropout(model, include=["5", "10"]).converted) == ["5", "10"]
    assert convert_dropout(model, include=["5", "10"]) == ConversionReport({}, {"1": "not included"})


@pytest.mark.parametrize("arguments", [{"unit_dim": {"10": 0}}, {"unit_dim": {"10": "x"}}, {"unit_dim": "x"}])
def test_a_unit_dim_that_is_refused_leaves_the_model_as_it_was(arguments: dict[str, Any]) -> None:
    model = conv_net()
    before = dict(model.named_modules())
    with pytest.raises(ConfigurationError):
        convert_dropout(model, **arguments)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("drop", [nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d()])
def test_a_model_that_is_a_dropout_itself_is_refused(drop: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="A layer is replaced in the module that holds it"):
        convert_dropout(drop)


def test_restoring_a_layer_by_itself_is_refused() -> None:
    model = nn.Sequential(nn.Dropout(0.2))
    convert_dropout(model)
    with pytest.raises(ConfigurationError) as caught:
        restore_dropout(model[0])
    assert str(caught.value) == (
        "restore_dropout(ConductanceDropout(p=0.2, unit_dim=-1, elementwise=True)) was given. "
        "A layer is replaced in the module that holds it. "
        "Pass that module."
    )


def test_restoring_what_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        restore_dropout("net")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "restore_dropout('net') was given. A model is an instance of torch.nn.Module. Pass the model itself."
    )


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def parametrized(drop: nn.Module) -> nn.Module:
    """Give a dropout a parametrization: it is then of a subclass, and holds a module."""
    drop.register_buffer("scale", torch.ones(1))
    return parametrize.register_parametrization(drop, "scale", Same())


def with_hook(register: str) -> nn.Module:
    drop = nn.Dropout()
    getattr(drop, register)(lambda *args: None)
    return drop


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        *(
            (with_hook(register), "it has hooks, which a new layer would not have")
            for register in (
                *("register_forward_hook", "register_forward_pre_hook"),
                *("register_full_backward_hook", "register_full_backward_pre_hook"),
            )
        ),
        (nn.Dropout(1.0), "with p=1 it drops everything, and nothing is left to rescale"),
        (HouseDropout(), "HouseDropout is none of nn.Dropout, 1d, 2d and 3d"),
        (Thinning(), "Thinning is none of nn.Dropout, 1d, 2d and 3d"),
        (parametrized(nn.Dropout()), "ParametrizedDropout is none of nn.Dropout, 1d, 2d and 3d"),
        (nn.AlphaDropout(), "AlphaDropout is none of nn.Dropout, 1d, 2d and 3d"),
        (nn.FeatureAlphaDropout(), "FeatureAlphaDropout is none of nn.Dropout, 1d, 2d and 3d"),
        (StochasticDepth(0.1, "row"), "StochasticDepth is none of nn.Dropout, 1d, 2d and 3d"),
        (
            nn.MultiheadAttention(4, 2, dropout=0.1),
            "dropout=0.1 of its attention weights is no module, and they have no units",
        ),
        (
            nn.LSTM(4, 4, num_layers=2, dropout=0.2),
            "dropout=0.2 between its recurrent layers is no module; write several recurrent layers "
            "with nn.Dropout between them",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_converted_is_left_with_its_reason(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), module, nn.Dropout())
    report = convert_dropout(model)
    assert model[1] is module
    assert list(report.converted) == ["2"]
    assert report.left == {"1": reason}


@pytest.mark.parametrize("subclass", [HouseDropout, Thinning])
def test_subclasses_are_never_converted(subclass: type[nn.Dropout]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), subclass(), nn.Dropout())
    convert_dropout(model)
    assert type(model[1]) is subclass
    assert type(model[2]) is ConductanceDropout


@pytest.mark.parametrize("quiet", [nn.MultiheadAttention(4, 2), nn.LSTM(4, 4, num_layers=2)])
def test_what_drops_nothing_is_not_reported(quiet: nn.Module) -> None:
    assert convert_dropout(nn.Sequential(quiet)) == ConversionReport({}, {})


def test_a_layer_of_the_users_own_is_neither_converted_nor_restored() -> None:
    own = ConductanceDropout(0.2, unit_dim=-1)
    model = nn.Sequential(nn.Linear(4, 4), own, nn.Dropout())
    assert list(convert_dropout(model).converted) == ["2"]
    assert model[1] is own
    report = restore_dropout(model)
    assert list(report.converted) == ["2"]
    assert report.left == {"1": "it was not made by convert_dropout"}
    assert model[1] is own


def test_a_second_call_converts_what_was_added_alone() -> None:
    model = conv_net()
    convert_dropout(model)
    before = layers_of(model)
    assert convert_dropout(model) == ConversionReport({}, {})
    assert {name: id(layer) for name, layer in layers_of(model).items()} == {
        name: id(layer) for name, layer in before.items()
    }
    model.append(nn.Dropout(0.1))
    assert list(convert_dropout(model).converted) == ["12"]


def test_restoring_brings_back_the_very_modules_in_todays_mode() -> None:
    model = conv_net()
    originals = dict(model.named_children())
    convert_dropout(model)
    model.eval()
    report = restore_dropout(model)
    assert list(report.converted) == ["1", "5", "10"]
    assert dict(model.named_children()) == originals
    assert not any(module.training for module in model.modules())
    assert restore_dropout(model) == ConversionReport({}, {})
    convert_dropout(model)
    model.train()
    restore_dropout(model)
    assert all(originals[name].training for name in ("1", "5", "10"))


def test_what_was_replaced_is_no_part_of_the_model() -> None:
    model = conv_net()
    originals = [module for module in model.modules() if "Dropout" in type(module).__name__]
    convert_dropout(model)
    assert len(originals) == 3
    assert not {id(module) for module in model.modules()} & {id(module) for module in originals}
    assert all(not list(layer.children()) for layer in layers_of(model).values())


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_a_converted_model_can_be_copied_and_saved_as_a_whole(way: str) -> None:
    model, x = conv_net(), torch.randn(4, 2, 6, 6)
    convert_dropout(model)
    YDrop(model, n_steps=2).step(x, torch.arange(4) % 3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = copy.deepcopy(model) if way == "deepcopy" else torch.load(file, weights_only=False)
    assert torch.equal(same_seed(twin, x), same_seed(model, x))
    assert all(layer.active for layer in layers_of(twin).values())
    restore_dropout(twin)
    assert [type(twin[place]) for place in (1, 5, 10)] == [nn.Dropout2d, nn.Dropout, nn.Dropout]
    # Restoring one leaves the other alone: they share no modules.
    assert list(layers_of(model)) == ["1", "5", "10"]


def test_names_are_those_before_compilation() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    compiled: Any = torch.compile(inner, backend="eager")
    model = nn.Sequential(compiled, nn.Dropout())
    report = convert_dropout(model, include="0.*", unit_dim={"0.1": 1})
    assert list(report.converted) == ["0.1"]
    assert report.left == {"1": "not included"}
    assert dims_of(inner) == {"1": (1, True)}
    assert list(restore_dropout(model).converted) == ["0.1"]
    assert type(inner[1]) is nn.Dropout


def test_a_compiled_model_is_converted_inside() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    compiled: Any = torch.compile(inner, backend="eager")
    report = convert_dropout(compiled)
    assert list(report.converted) == ["1"]
    assert list(layers_of(inner)) == ["1"]


def test_what_is_compiled_by_itself_is_left() -> None:
    drop: Any = torch.compile(nn.Dropout(), backend="eager")
    model = nn.Sequential(nn.Linear(4, 4), drop, nn.Dropout())
    reason = "compiled by itself, it would be called even when another stood there"
    report = convert_dropout(model)
    assert list(report.converted) == ["2"]
    assert report.left == {"1": reason}
    assert model[1] is drop
    layer = model[2]
    compiled: Any = torch.compile(layer, backend="eager")
    model[2] = compiled
    assert restore_dropout(model) == ConversionReport({}, {"2": reason})
    assert model[2] is compiled
    model[2] = layer
    assert list(restore_dropout(model).converted) == ["2"]


def test_a_model_that_is_a_compiled_dropout_is_left() -> None:
    drop: Any = torch.compile(nn.Dropout(), backend="eager")
    assert str(convert_dropout(drop)).splitlines()[:2] == [
        "0 dropout layer(s) converted, 1 left.",
        "  the model itself: left, compiled by itself, it would be called even when another stood there",
    ]


def test_an_empty_report_says_so() -> None:
    expected = (
        "0 dropout layer(s) converted, 0 left: the model holds none to change.\n"
        "Calls of F.dropout in a forward are no modules: they stay. YDropCallback names them in the first batch."
    )
    model = nn.Sequential(nn.Linear(4, 4))
    assert str(convert_dropout(model)) == str(restore_dropout(model)) == expected


def test_a_report_says_what_is_no_longer_in_place() -> None:
    drop = nn.Dropout(0.2, inplace=True)
    model = nn.Sequential(nn.Linear(4, 4), drop, drop, nn.Dropout2d(inplace=True), nn.Dropout(0.2))
    changes = convert_dropout(model).converted
    assert {name: change.partition("), ")[2] for name, change in changes.items()} == {
        "1": "behind Linear, no longer in place",
        "2": "as before, where it is the same layer, no longer in place",
        "3": "its channels, no longer in place",
        "4": "behind Linear",
    }


def test_a_report_says_it_all() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.Dropout(0.2),
        nn.AlphaDropout(),
        nn.Dropout(1.0),
    )
    report = convert_dropout(model)
    assert str(report) == (
        "2 dropout layer(s) converted, 2 left.\n"
        "  1: Dropout2d(p=0.3) -> ConductanceDropout(p=0.3, unit_dim=1, elementwise=False), its channels\n"
        "  4: Dropout(p=0.2) -> ConductanceDropout(p=0.2, unit_dim=-1, elementwise=True), behind Linear\n"
        "  5: left, AlphaDropout is none of nn.Dropout, 1d, 2d and 3d\n"
        "  6: left, with p=1 it drops everything, and nothing is left to rescale\n"
        "Y-Drop turns p=0.2 into about 0.06 and 0.26 by importance.\n"
        "Y-Drop turns p=0.3 into about 0.08 and 0.38 by importance.\n"
        "Calls of F.dropout in a forward are no modules: they stay. YDropCallback names them in the first batch."
    )
    assert str(restore_dropout(model)) == (
        "2 dropout layer(s) converted, 0 left.\n"
        "  1: ConductanceDropout(p=0.3, unit_dim=1, elementwise=False) -> Dropout2d(p=0.3, inplace=False)\n"
        "  4: ConductanceDropout(p=0.2, unit_dim=-1, elementwise=True) -> Dropout(p=0.2, inplace=False)\n"
        "Calls of F.dropout in a forward are no modules: they stay. YDropCallback names them in the first batch."
    )


def jumpouts(model: nn.Module) -> dict[str, str]:
    return {name: module.granularity for name, module in model.named_modules() if isinstance(module, Jumpout)}


def test_jumpout_comes_where_a_relu_stands_before() -> None:
    model = conv_net()
    report = convert_dropout(model, to=Jumpout)
    assert jumpouts(model) == {"5": "element", "10": "element"}
    assert report.left == {"1": "no nn.ReLU is seen before it"}
    assert "Dropout(p=0.2) -> Jumpout(p_min=0.0, sigma=0.1, p_max=0.5, granularity='element'" in str(report)


def test_what_drops_nothing_becomes_no_jumpout() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0))
    assert convert_dropout(model, to=Jumpout).left == {"2": "with p=0 it drops nothing, and Jumpout would"}
    assert convert_dropout(model).converted.keys() == {"2"}
    reason = "it is a ConductanceDropout; restore_dropout, where that has been convert_dropout's work, comes first"
    assert convert_dropout(model, to=Jumpout) == ConversionReport({}, {"2": reason})


@pytest.mark.parametrize(
    ("before", "converted"),
    [
        ([nn.ReLU()], True),
        ([nn.ReLU6(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()], True),
        ([nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.ReLU(), nn.Identity())), nn.AvgPool2d(2)], True),
        ([nn.ReLU(), nn.Dropout2d(0.1), nn.MaxPool2d(2)], True),
        ([nn.ReLU(), nn.BatchNorm2d(2)], False),
        ([nn.ReLU(), nn.Conv2d(2, 2, 1)], False),
        ([nn.LeakyReLU()], False),
        ([nn.GELU(), nn.MaxPool2d(2)], False),
        ([nn.Identity()], False),
        ([], False),
    ],
)
def test_what_lies_between_a_relu_and_jumpout(before: list[nn.Module], converted: bool) -> None:
    for last in (nn.Dropout(), nn.Sequential(nn.Dropout())):
        model = nn.Sequential(*copy.deepcopy(before), last)
        report = convert_dropout(model, to=Jumpout)
        name = f"{len(before)}.0" if isinstance(last, nn.Sequential) else f"{len(before)}"
        assert (name in report.converted) == converted
        assert (name in report.left) != converted


def test_jumpout_goes_where_convolutions_have_channels_and_back_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(6, 2)).eval()
    old = model[2]
    convert_dropout(model, to=Jumpout)
    assert jumpouts(model) == {"2": "channel"}
    assert not model[2].training
    x = torch.randn(4, 3, 3, 3)
    expected = model(x)
    assert torch.equal(model.train()(x), model(x)) is False
    assert restore_dropout(model).converted.keys() == {"2"}
    assert model[2] is old
    assert model[2].training
    assert torch.equal(model.eval()(x), expected)


def test_torchvisions_classifiers_take_jumpout() -> None:
    alexnet = models.AlexNet(num_classes=5)
    assert convert_dropout(alexnet, to=Jumpout).converted.keys() == {"classifier.0", "classifier.3"}
    mobilenet = models.mobilenet_v3_small(num_classes=5)  # its classifier has a hard swish
    assert "classifier.2" in convert_dropout(mobilenet, to=Jumpout).left


@pytest.mark.parametrize("wrong", [{"to": nn.Dropout}, {"to": Jumpout()}, {"to": Jumpout, "unit_dim": {"*": 1}}])
def test_what_dropout_cannot_become_is_refused(wrong: dict[str, Any]) -> None:
    model = conv_net()
    before = repr(model)
    with pytest.raises(ConfigurationError, match=r"convert_dropout\(to="):
        convert_dropout(model, **wrong)
    assert repr(model) == before


class Refusing(nn.ModuleDict):
    """Puts what it is given into itself, then raises its error, if it has one."""

    error: type[BaseException] | None = None

    def register_module(self, name: str, module: nn.Module | None) -> None:
        super().register_module(name, module)
        if self.error is not None:
            raise self.error(name)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("to", [ConductanceDropout, Jumpout])
def test_a_replacement_that_raises_leaves_the_model_as_it_was(error: type[BaseException], to: Any) -> None:
    repeated = nn.Dropout(0.2)
    refusing = Refusing({"relu": nn.ReLU(), "drop": nn.Dropout()})
    model = nn.Sequential(nn.ReLU(), repeated, nn.ModuleList([repeated]), refusing, nn.Dropout(0.3))

    def named() -> dict[str, nn.Module]:
        return dict(model.named_modules(remove_duplicate=False))

    original = named()
    refusing.error = error
    with pytest.raises(error):
        convert_dropout(model, to=to)
    assert named() == original
    refusing.error = None
    assert len(convert_dropout(model, to=to).converted) == 4
    converted = named()
    model.eval()
    refusing.error = error
    with pytest.raises(error):
        restore_dropout(model)
    assert named() == converted
    assert all(module.training for name, module in original.items() if type(module) is nn.Dropout)


class Elsewhere(Sequence[str]):
    """A sequence that is no list, as of OmegaConf."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


class Placed(Mapping[str, Any]):
    """A mapping that is no dictionary."""

    def __init__(self, **items: Any) -> None:
        self.items_of = items

    def __getitem__(self, name: str) -> Any:
        return self.items_of[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_of)

    def __len__(self) -> int:
        return len(self.items_of)


@pytest.mark.parametrize("kind", [list, tuple, UserList, lambda items: Elsewhere(*items)])
def test_patterns_come_in_any_sequence(kind: Callable[[list[str]], Any]) -> None:
    assert list(convert_dropout(conv_net(), include=kind(["1", "5"])).converted) == ["1", "5"]
    assert list(convert_dropout(conv_net(), exclude=kind(["1", "5"])).converted) == ["10"]


@pytest.mark.parametrize("kind", [dict, MappingProxyType, UserDict, lambda items: Placed(**items)])
@pytest.mark.parametrize("dim", [-2, numpy.int64(-2), numpy.int8(-2)])
def test_unit_dims_come_in_any_mapping_and_as_numpys_integers(kind: Callable[[dict[str, Any]], Any], dim: int) -> None:
    model = conv_net()
    convert_dropout(model, unit_dim=kind({"5": dim}))
    assert dims_of(model)["5"] == (-2, True)
    assert type(layers_of(model)["5"].unit_dim) is int


@pytest.mark.parametrize("patterns", [3, b"1", {"1"}, {"1": 1}, ["1", 3], Elsewhere("1", None)])
def test_what_are_no_patterns_is_refused(patterns: Any) -> None:
    for name in ("include", "exclude"):
        with pytest.raises(ConfigurationError, match=rf"convert_dropout\({name}="):
            convert_dropout(conv_net(), **{name: patterns})


def test_a_name_is_a_pattern_even_where_it_has_the_signs_of_one() -> None:
    model = nn.ModuleDict({"a[0]": nn.Dropout(), "a0": nn.Dropout()})
    assert list(convert_dropout(model, include="a[0]").converted) == ["a0"]
    with pytest.raises(ConfigurationError, match="The pattern"):
        convert_dropout(nn.ModuleDict({"a[0]": nn.Dropout()}), include="a[0]")


def flat(count: int) -> nn.Module:
    return nn.Sequential(*(module for _ in range(count) for module in (nn.ReLU(), nn.Dropout())))


def nested(count: int) -> nn.Module:
    block = [nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Sequential(nn.Dropout())) for _ in range(count)]
    return nn.Sequential(*block)


def deep(count: int) -> nn.Module:
    model = nn.Sequential(nn.Dropout())
    for _ in range(50):
        model = nn.Sequential(model, *(nn.Dropout() for _ in range(count // 50)))
    return model


def shared(count: int) -> nn.Module:
    drop = nn.Dropout()
    return nn.Sequential(*(nn.Sequential(nn.ReLU(), drop) for _ in range(count)))


def told(model: nn.Module) -> dict[str, Any]:
    names = [name for name, module in model.named_modules() if type(module) is nn.Dropout]
    return {"unit_dim": dict.fromkeys(names, 1), "include": names}


def steps_of(work: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """Count the steps of the interpreter. They say how long it takes, whatever else the machine does."""
    count = 0

    def count_up(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return count_up

    before = sys.gettrace()
    sys.settrace(count_up)
    try:
        work(*args, **kwargs)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "arguments", [lambda model: {}, lambda model: {"to": Jumpout}, told], ids=["", "jumpout", "told"]
)
@pytest.mark.parametrize("build", [flat, nested, deep, shared])
def test_time_is_linear_in_the_number_of_layers(
    build: Callable[[int], nn.Module], arguments: Callable[[nn.Module], dict[str, Any]]
) -> None:
    steps: dict[str, list[int]] = {"convert": [], "restore": []}
    for count in (100, 200):
        model = build(count)
        given = arguments(model)
        steps["convert"].append(steps_of(convert_dropout, model, **given))
        steps["restore"].append(steps_of(restore_dropout, model))
    for fewer, more in steps.values():
        assert more < 2.2 * fewer
