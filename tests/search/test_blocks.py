import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from lightning_ydrop import find_places
from lightning_ydrop.search.places import PlaceReport
from tests.search.networks import Block, Flat, Holder, Nested, Plain, PooledInCode, Remembering, Untraceable, wide


def shape_of(report: PlaceReport) -> list[int]:
    """How many blocks each stage has."""
    stages = [name.partition(".")[0] for name in report.places]
    return [stages.count(stage) for stage in dict.fromkeys(stages)]


def without_values(build: Callable[..., nn.Module]) -> nn.Module:
    """Build a large network where it costs nothing."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialising nothing
        return build()


def test_a_resnet_has_a_place_for_each_block_with_its_shortcut() -> None:
    report = find_places(without_values(models.resnet18))
    assert shape_of(report) == [2, 2, 2, 2]
    place = report.places["stage2.1"]
    assert place.kind == "conv"
    assert place.modules == ("layer2.0.bn1", "layer2.0.bn2")
    assert place.shortcuts == ("layer2.0.downsample",)  # which holds a convolution
    assert report.places["stage2.2"].shortcuts == ("layer2.1.downsample",)  # which is None
    assert place.why == "BasicBlock layer2.0, after batch normalisation"
    assert report.not_reached == {"bn1": "it lies outside of the residual blocks"}
    assert str(report).splitlines()[0] == "8 place(s) for patterns, 1 not reached."
    assert str(report).splitlines()[1] == (
        "  stage1.1: layer1.0.bn1, layer1.0.bn2; shortcut layer1.0.downsample; "
        "BasicBlock layer1.0, after batch normalisation"
    )


def test_deeper_and_wider_networks_have_the_same_stages() -> None:
    assert shape_of(find_places(without_values(models.resnet50))) == [3, 4, 6, 3]
    assert all(place.shortcuts for place in find_places(without_values(models.resnet50)).places.values())
    assert find_places(without_values(models.resnet50)).places["stage1.2"].modules == tuple(
        f"layer1.1.bn{i}" for i in (1, 2, 3)
    )
    assert shape_of(find_places(wide(28, 2))) == shape_of(find_places(wide(28, 0.5))) == [4, 4, 4]
    assert shape_of(find_places(wide(10, 1))) == [1, 1, 1]
    assert list(find_places(wide(16, 3)).places) == list(find_places(wide(16, 1)).places)


def test_a_wide_resnet_has_its_norms_before_the_convolutions() -> None:
    report = find_places(wide(16, 1))
    assert report.places["stage3.2"].modules == ("stages.2.1.bn1", "stages.2.1.bn2")
    assert report.places["stage3.2"].shortcuts == ("stages.2.1.shortcut",)
    assert report.not_reached.keys() == {"norm"}


@pytest.mark.parametrize(
    ("name", "shape", "with_shortcut"),
    [
        ("resnet18", [2, 2, 2, 2], 8),
        ("resnet26d", [2, 2, 2, 2], 8),
        ("seresnet18", [2, 2, 2, 2], 8),
        ("resnetv2_50", [3, 4, 6, 3], 16),
        ("efficientnet_b0", [2, 2, 3, 3, 4, 1], 0),
        ("mobilenetv3_small_100", None, 0),
        ("regnety_002", [1, 1, 4, 7], 13),
    ],
)
def test_networks_of_timm(name: str, shape: list[int] | None, with_shortcut: int) -> None:
    report = find_places(without_values(partial(timm.create_model, name)))
    assert shape is None or shape_of(report) == shape
    assert sum(bool(place.shortcuts) for place in report.places.values()) == with_shortcut
    assert len(report.places) > 3
    assert not any(".se." in module for place in report.places.values() for module in place.modules)


def test_a_shortcut_in_code_is_reported_with_what_to_write() -> None:
    report = find_places(without_values(models.mobilenet_v2))
    assert shape_of(report) == [1, 2, 3, 4, 3, 3, 1]
    assert not any(place.shortcuts for place in report.places.values())
    assert "self.shortcut = nn.Identity()" in report.not_reached["the shortcut of features.3"]
    assert report.not_reached["the shortcut of features.2"] == "this InvertedResidual has no shortcut"
    assert report.not_reached.keys() >= {"features.0.1", "features.18.1"}  # the stem and the head
    assert shape_of(find_places(without_values(models.efficientnet_b0))) == [1, 2, 2, 3, 3, 4, 1]
    thin, thick = (without_values(partial(models.mobilenet_v3_small, width_mult=width)) for width in (1.0, 2.0))
    assert shape_of(find_places(thin)) == shape_of(find_places(thick)) == [1, 2, 3, 2, 3]


def test_networks_without_blocks_have_a_place_for_each_norm_or_convolution() -> None:
    assert shape_of(find_places(without_values(models.vgg11_bn))) == [1, 1, 2, 2, 2]
    assert find_places(without_values(models.vgg11_bn)).places["stage3.2"].modules == ("features.12",)
    plain = find_places(without_values(models.vgg11))
    assert shape_of(plain) == [1, 1, 2, 2, 2]
    assert plain.places["stage3.2"].modules == ("features.8",)
    assert plain.places["stage3.2"].why == "after a convolution, as there is no batch norm"
    dense = find_places(without_values(models.densenet121))
    assert shape_of(dense) == [1, 13, 25, 49, 33]
    assert find_places(without_values(models.squeezenet1_1)).not_reached == {"classifier.1": "it makes the output"}


def test_where_no_module_pools_widths_tell_the_stages() -> None:
    report = find_places(Plain())
    assert [place.modules for place in report.places.values()] == [("norms.0",), ("norms.1",), ("norms.2",)]
    assert shape_of(report) == [2, 1]
    grouped = find_places(Plain(norm=False))
    assert [place.modules for place in grouped.places.values()] == [("convs.0",), ("convs.1",), ("convs.2",)]


def test_blocks_with_group_norms_are_masked_after_convolutions() -> None:
    report = find_places(without_values(partial(models.resnet18, norm_layer=partial(nn.GroupNorm, 4))))
    assert report.places["stage1.2"].modules == ("layer1.1.conv1", "layer1.1.conv2")
    assert report.places["stage1.2"].shortcuts == ("layer1.1.downsample",)
    assert "no batch norms" in report.places["stage1.2"].why


def test_a_network_that_adds_in_its_forward_has_a_place_for_each_path() -> None:
    report = find_places(Flat())
    assert [place.modules for place in report.places.values()] == [("paths.0.1",), ("paths.1.1",)]
    assert report.not_reached["stem.1"] == "it lies outside of the residual blocks"
    assert "the shortcut of paths.0" in report.not_reached
    traced = find_places(torch.fx.symbolic_trace(models.resnet18()))
    assert shape_of(traced) == [2, 2, 2, 2]
    assert traced.places["stage2.1"].shortcuts == ("layer2.0.downsample.1",)


@pytest.mark.parametrize("shortcut", [None, nn.Identity(), nn.Sequential(), nn.Conv2d(4, 4, 1)])
def test_a_shortcut_may_be_none_an_identity_empty_or_a_module(shortcut: nn.Module | None) -> None:
    report = find_places(nn.Sequential(Block(shortcut)))
    assert report.places["stage1.1"].modules == ("0.bn", "0.late")
    assert report.places["stage1.1"].shortcuts == ("0.shortcut",)
    assert report.not_reached == {}


def test_an_attribute_that_is_none_and_never_called_is_no_shortcut() -> None:
    report = find_places(nn.Sequential(Block(None, in_code=True)))
    assert report.places["stage1.1"].shortcuts == ()
    assert "adds the shortcut in code" in report.not_reached["the shortcut of 0"]


def test_an_addition_inside_a_branch_makes_no_block_of_its_own() -> None:
    report = find_places(nn.Sequential(Nested()))
    assert report.places["stage1.1"].modules == ("0.bn", "0.late")
    assert len(report.places) == 1


def test_a_container_of_several_blocks_is_a_stage() -> None:
    assert list(find_places(PooledInCode()).places) == ["stage1.1", "stage1.2", "stage2.1", "stage2.2"]


def test_names_tell_where_torch_fx_cannot_follow() -> None:
    report = find_places(nn.Sequential(Untraceable(), Untraceable(nn.Identity())))
    assert [place.shortcuts for place in report.places.values()] == [("0.shortcut",), ("1.shortcut",)]
    assert "told by its name" in report.places["stage1.1"].why


def test_looking_leaves_no_trace() -> None:
    model = nn.Sequential(Remembering(), Remembering())
    numbers, state = torch.get_rng_state(), random.getstate()
    attributes = {name: {**vars(module), **module._modules} for name, module in model.named_modules()}
    assert len(find_places(model).places) == 2
    assert torch.equal(torch.get_rng_state(), numbers)
    assert random.getstate() == state
    for name, module in model.named_modules():
        now = {**vars(module), **module._modules}
        assert now.keys() == attributes[name].keys()
        assert all(now[key] is value for key, value in attributes[name].items())
    assert model[0].seen == []
    assert model[0].last is None
    assert model[0].count == 0


def test_names_are_those_inside_a_lightning_module_or_something_compiled() -> None:
    network = models.resnet18()
    held = find_places(Holder(network))
    assert held.places["stage1.1"].modules == ("network.layer1.0.bn1", "network.layer1.0.bn2")
    compiled: Any = torch.compile(network)
    assert str(find_places(compiled)) == str(find_places(network))


def test_networks_inside_metrics_are_left_alone() -> None:
    from torchmetrics import Metric

    class Distance(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def update(self) -> None: ...

        def compute(self) -> None: ...

    holder = Holder(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    holder.distance = Distance()
    assert [place.modules for place in find_places(holder).places.values()] == [("network.1",)]


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)), "(B, C, L)"),
        (nn.Conv3d(2, 4, 3), "(B, C, D, H, W)"),
        (nn.LSTM(2, 4), "recurrent"),
        (nn.Sequential(), "it holds no batch norm"),
        (nn.Linear(2, 3), "it holds no batch norm"),
        (torch.nn.Module(), "it holds no batch norm"),
    ],
)
def test_what_has_no_places_says_so(model: nn.Module, word: str) -> None:
    report = find_places(model)
    assert report.places == {}
    assert any(word in why for why in report.not_reached.values())
