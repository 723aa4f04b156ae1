import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from lightning_ydrop import (
    ConfigurationError,
    ConvPattern,
    PatternDropout,
    TokenPattern,
    YDrop,
    apply_patterns,
    convert_dropout,
    find_places,
    monte_carlo,
    remove_patterns,
)
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.applying import Silenced, layers_of, reattach
from tests.search.networks import PROVED, Block, Holder, bert, outputs, own_transformer, torch_encoder, vit, wide

CONV = ConvPattern(0.25, residual=True, rate=0.5)
TOKEN = TokenPattern(2, rate=0.4)


def everywhere(model: nn.Module) -> dict[str, Pattern]:
    return {name: CONV if place.kind == "conv" else TOKEN for name, place in find_places(model).places.items()}


def seeded(model: Any, x: Any) -> Tensor:
    torch.manual_seed(5)
    return outputs(model(x))


def insides(model: nn.Module) -> dict[str, Any]:
    """Everything that a model is made of, by identity: modules with their attributes, registries and hooks."""
    return {
        name: (
            id(module),
            {key: id(value) for key, value in vars(module).items() if not isinstance(value, dict)},
            {key: id(value) for key, value in module._modules.items()},
            dict(module._forward_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.fixture(params=PROVED)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    build, make_input = PROVED[request.param]
    return build(), make_input()


def test_patterns_drop_in_training_and_evaluation_is_the_same(case: tuple[nn.Module, Any]) -> None:
    model, x = case
    original = copy.deepcopy(model)
    report = apply_patterns(model, everywhere(model))
    assert len(report.applied) == len(find_places(original).places) > 1
    assert not torch.equal(seeded(model.train(), x), seeded(original.train(), x))
    assert not torch.equal(outputs(model(x)), outputs(model(x)))
    assert torch.equal(outputs(model.eval()(x)), outputs(original_with_statistics_of(model, original).eval()(x)))
    with torch.no_grad():  # where nn.TransformerEncoderLayer takes its fast path
        assert torch.equal(outputs(model(x)), outputs(original.eval()(x)))


def original_with_statistics_of(model: nn.Module, original: nn.Module) -> nn.Module:
    original.load_state_dict(model.state_dict(), strict=True)
    return original


def test_the_state_dict_is_that_of_the_model_both_ways(case: tuple[nn.Module, Any]) -> None:
    model, _ = case
    original = copy.deepcopy(model)
    apply_patterns(model, everywhere(model))
    assert list(model.state_dict()) == list(original.state_dict())
    model.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(model.state_dict(), strict=True)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]


def test_removing_gives_back_exactly_what_was_there(case: tuple[nn.Module, Any]) -> None:
    model, _ = case
    before, shown = insides(model), repr(model)
    applied = apply_patterns(model, everywhere(model))
    assert insides(model) != before
    removed = remove_patterns(model)
    assert insides(model) == before
    assert repr(model) == shown
    assert removed.applied.keys() == applied.applied.keys()
    assert remove_patterns(model).applied == {}
    assert insides(model) == before


def test_places_are_the_same_while_patterns_stand(case: tuple[nn.Module, Any]) -> None:
    model, _ = case
    before = find_places(model)
    patterns = everywhere(model)
    apply_patterns(model, patterns)
    applied = insides(model)
    assert find_places(model) == before
    assert insides(model) == applied
    first = layers_of(model)
    apply_patterns(model, patterns)
    assert len(layers_of(model)) == len(first)
    assert not set(map(id, layers_of(model))) & set(map(id, first))


def test_copies_and_pickles_draw_alike_and_can_be_undone(case: tuple[nn.Module, Any]) -> None:
    model, x = case
    shown = repr(model)
    apply_patterns(model, everywhere(model))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(seeded(copied.train(), x), seeded(copy.deepcopy(model).train(), x))
        assert layers_of(copied)
        remove_patterns(copied)
        assert repr(copied) == shown


def test_training_and_evaluation_reach_the_patterns_and_what_comes_back() -> None:
    model = vit()
    apply_patterns(model, everywhere(model))
    for mode in (False, True):
        model.train(mode)
        assert {layer.training for layer in layers_of(model)} == {mode}
    model.eval()
    remove_patterns(model)
    assert not any(module.training for module in model.modules())
    frozen = wide(10, 0.5)
    frozen.stages[0].eval()
    apply_patterns(frozen, everywhere(frozen))
    assert not any(module.training for module in frozen.stages[0].modules())
    assert all(module.training for module in frozen.stages[1].modules())


def test_every_masked_module_draws_for_itself() -> None:
    model = nn.Sequential(Block(nn.Identity()))
    apply_patterns(model, {"stage1.1": ConvPattern(0.5, residual=True)})
    zeros = {}
    for name in ("bn", "late", "shortcut"):
        module = model[0].get_submodule(name)
        module.register_forward_hook(lambda module, args, output, name=name: zeros.update({name: output == 0}))
    model(torch.randn(8, 4, 8, 8))
    assert [float(zeros[name].float().mean()) for name in zeros] == [0.25] * 3
    assert not torch.equal(zeros["bn"], zeros["late"])
    assert not torch.equal(zeros["bn"], zeros["shortcut"])


@pytest.mark.parametrize(
    "shortcut", [None, nn.Identity(), nn.Sequential(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))]
)
@pytest.mark.parametrize("residual", [True, False])
def test_the_shortcut_is_masked_before_the_addition(shortcut: nn.Module | None, residual: bool) -> None:
    block = Block(copy.deepcopy(shortcut))
    for norm in (block.bn, block.late):
        nn.init.zeros_(norm.weight)  # the branch is zero
    report = apply_patterns(nn.Sequential(block), {"stage1.1": ConvPattern(0.5, residual=residual)})
    out = block(torch.rand(8, 4, 8, 8) + 1)
    assert float((out == 0).float().mean()) == (0.25 if residual else 0)
    assert report.left == {}


def test_an_activation_that_shortcut_and_branch_share_takes_no_pattern() -> None:
    relu = nn.ReLU()
    block = Block(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), relu))
    block.relu = relu
    block.conv.register_forward_hook(lambda module, args, output: relu(output))
    before = insides(block)
    calls: list[float] = []
    apply_patterns(nn.Sequential(block), {"stage1.1": ConvPattern(0.5, residual=True)})
    relu.register_forward_hook(lambda module, args, output: calls.append(float((output == 0).float().mean())))
    branch: dict[str, Tensor] = {}
    block.shortcut.register_forward_hook(lambda module, args, output: branch.update(shortcut=output))  # type: ignore[union-attr]
    x = torch.rand(8, 4, 8, 8)
    nn.init.ones_(block.shortcut[1].bias)  # type: ignore[index]
    nn.init.zeros_(block.shortcut[1].weight)  # type: ignore[index]
    block(x)
    assert float((branch["shortcut"] == 0).float().mean()) == 0.25
    assert calls[1] == 0, "the shortcut's ReLU puts out ones, which the pattern masks after it"
    reattach(block)
    assert len(block.shortcut._forward_hooks) == 1, "a sequence calls its pattern by itself"  # type: ignore[union-attr]
    for module in (relu, block.shortcut):
        module._forward_hooks.clear()  # type: ignore[union-attr]
    remove_patterns(block)
    assert insides(block) == before


def test_other_tensors_than_those_of_its_place_are_refused_by_name() -> None:
    model = own_transformer()
    apply_patterns(model, {"queries": TOKEN, "attention": TOKEN})
    layers = {layer.extra_repr(): layer for layer in layers_of(model)}
    assert layers
    queries = next(layer for layer in layers_of(model) if not layer._takes_weights)
    weights = next(layer for layer in layers_of(model) if layer._takes_weights)
    for layer, shape, said in (
        (queries, (2, 4, 4, 8), "of the place 'queries', on "),
        (queries, (2, 8), "takes tokens (B, T, C) there"),
        (weights, (2, 4, 8), "takes attention weights (B, heads, queries, keys) there. Leave this place"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            layer(torch.randn(shape))


def test_a_shortcut_that_is_not_reached_is_reported() -> None:
    report = apply_patterns(nn.Sequential(Block(in_code=True)), {"stage1.1": CONV})
    assert report.left == {"the shortcut of stage1.1": "it is not reached, so residual=True changes nothing"}


def test_the_report_is_readable() -> None:
    model = nn.Sequential(Block(), Block(), nn.Dropout(0.5))
    report = apply_patterns(model, {"stage1.1": ConvPattern(0.25), "stage1.2": ConvPattern(0)})
    assert str(report) == (
        "1 pattern(s) applied, 1 ordinary dropout layer(s) replaced, 3 left.\n"
        "  stage1.1: ConvPattern(size=0.25, stride=0.125, repeat=1, rotate=0.0, shear_x=0.0, shear_y=0.0, "
        "share_c=False, residual=False, rate=1.0)\n"
        "  0.drop: Dropout(p=0.3, inplace=False) -> nothing, beside the pattern of stage1.1\n"
        "  stage1.2: left, its pattern is empty\n"
        "  1.drop: left, it is at no place with a pattern\n"
        "  2: left, it is at no place with a pattern"
    )
    assert isinstance(model[0].drop, Silenced)
    assert isinstance(model[1].drop, nn.Dropout)
    assert str(remove_patterns(model)).splitlines()[0] == (
        "1 pattern(s) removed, 1 ordinary dropout layer(s) restored, 0 left."
    )


def test_ordinary_dropout_after_a_single_norm_is_silent_and_that_of_the_classifier_stays() -> None:
    def stage(width: int) -> list[nn.Module]:
        return [nn.Conv2d(width, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.2), nn.MaxPool2d(2)]

    model = nn.Sequential(*stage(3), *stage(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 2))
    report = apply_patterns(model, {"stage2.1": CONV})
    assert report.replaced.keys() == {"8"}
    assert {name for name in report.left if name.isdigit()} == {"3", "11"}


def test_at_a_place_of_a_transformer_ordinary_dropout_gives_way_and_stays_elsewhere() -> None:
    model = torch_encoder()
    first = model.layers[0].dropout
    report = apply_patterns(model, {"feed_forward": TOKEN, "residual": TokenPattern(0)})
    assert report.replaced == dict.fromkeys(
        ("layers.0.dropout", "layers.1.dropout"), "Dropout(p=0.1, inplace=False) -> the pattern of feed_forward"
    )
    assert isinstance(model.layers[0].dropout, PatternDropout)
    assert isinstance(model.layers[0].dropout1, nn.Dropout)
    assert report.left["residual"] == "its pattern is empty"
    assert report.left["layers.1.dropout2"] == "it is at no place with a pattern"
    remove_patterns(model)
    assert model.layers[0].dropout is first


def test_an_empty_pattern_everywhere_is_the_plain_network() -> None:
    model = wide(10, 0.5, p=0.2)
    before = insides(model)
    report = apply_patterns(model, dict.fromkeys(find_places(model).places, ConvPattern(0.5, rate=0)))
    assert report.applied == {}
    assert insides(model) == before


def test_attention_weights_are_dropped_by_key() -> None:
    model = own_transformer(1)
    apply_patterns(model, {"attention": TokenPattern("all", share_t=True, share_c=True, rate=0.5)})
    weights = []
    model[0].attention.dropout.register_forward_hook(lambda module, args, output: weights.append(output))
    model(torch.randn(4, 6, 8))
    assert weights[0].shape == (4, 2, 6, 6)
    assert (weights[0] == 0).any()


def test_the_model_follows_to_another_dtype_and_device() -> None:
    model = wide(10, 0.5)
    apply_patterns(model, everywhere(model))
    model.to(torch.bfloat16)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.to("meta")
    assert model(torch.randn(2, 3, 32, 32, device="meta")).device.type == "meta"
    late = wide(10, 0.5).to("meta")
    apply_patterns(late, everywhere(late))
    assert {layer._applied_progress.device.type for layer in layers_of(late)} == {"meta"}
    assert late(torch.randn(2, 3, 32, 32, device="meta")).device.type == "meta"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["torchvision's ResNet-18", "WRN-10-1", "our own block"])
def test_torchscript_and_torch_fx_take_the_model(name: str) -> None:
    build, make_input = PROVED[name]
    model, x = build(), make_input()
    original = copy.deepcopy(model).eval()
    apply_patterns(model, everywhere(model))
    model.eval()
    assert torch.allclose(torch.jit.script(model)(x), original(x), atol=1e-5)
    assert torch.allclose(torch.jit.trace(model, x)(x), original(x), atol=1e-5)
    model.train()
    scripted = torch.jit.script(model)
    assert not torch.allclose(scripted(x), scripted(x), atol=1e-3)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(seeded(traced, x), seeded(model, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_exported_model_bears_no_trace(tmp_path: Path) -> None:
    model, x = wide(10, 0.5).eval(), torch.randn(2, 3, 16, 16)
    plain = torch.export.export(model, (x,))
    apply_patterns(model, everywhere(model))
    masked = torch.export.export(model, (x,))
    assert [str(node.target) for node in masked.graph.nodes] == [str(node.target) for node in plain.graph.nodes]
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(file), verbose=False)
    assert b"pattern" not in file.read_bytes()


def test_compiled_it_is_one_graph() -> None:
    model, x = wide(10, 0.5), torch.randn(2, 3, 16, 16)
    apply_patterns(model, everywhere(model))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(seeded(compiled, x), seeded(model, x))
    model.eval()
    assert torch.equal(seeded(compiled, x), seeded(model, x))


def test_compiled_code_notices_patterns_that_come_and_go() -> None:
    model, x = wide(10, 0.5), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager")
    outputs_with = []
    for _ in range(2):
        assert torch.equal(seeded(compiled, x), seeded(model, x))
        apply_patterns(model, everywhere(model))
        outputs_with.append(seeded(compiled, x))
        assert torch.equal(outputs_with[-1], seeded(model, x))
        remove_patterns(model)
    assert torch.equal(*outputs_with)
    assert not torch.equal(outputs_with[0], seeded(compiled, x))


def test_ddp_wraps_the_model(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = wide(10, 0.5), torch.randn(2, 3, 16, 16)
        apply_patterns(model, everywhere(model))
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        torch.manual_seed(5)
        wrapped(x).sum().backward()
        assert list(find_places(wrapped).places) == list(find_places(model).places)
        seeded(model, x).sum().backward()
        for one, other in zip(wrapped.parameters(), model.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_synchronised_batch_norms_get_their_patterns_back() -> None:
    model = wide(10, 0.5)
    apply_patterns(model, everywhere(model))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    masked = [
        module for module in converted.modules() if isinstance(module, nn.SyncBatchNorm) and module._forward_hooks
    ]
    assert masked == []
    reattach(converted)
    masked = [
        module for module in converted.modules() if isinstance(module, nn.SyncBatchNorm) and module._forward_hooks
    ]
    assert len(masked) == 6
    reattach(converted)
    remove_patterns(converted)
    assert not any(module._forward_hooks for module in converted.modules())


@pytest.mark.parametrize(
    ("patterns", "word"),
    [
        ({"stage9.9": CONV}, "'stage9.9'"),
        ({"stage2.1": CONV, "queries": TOKEN}, "'queries'"),
        ({"stage1.1": TOKEN, "stage2.1": CONV, "stage3.1": CONV}, "takes a ConvPattern"),
        ({"stage1.1": CONV, "stage1.2": CONV, "stage1.9": CONV}, "stage1.9"),
        ({"stage1.1": 3}, "A pattern is written as class_path"),
        ([CONV], "Patterns are a mapping"),
    ],
)
def test_bad_input_ends_before_anything_changes(patterns: Any, word: str) -> None:
    model = wide(10, 0.5)
    apply_patterns(model, {"stage2.1": CONV})
    before = insides(model)
    with pytest.raises(ConfigurationError, match="apply_patterns") as caught:
        apply_patterns(model, patterns)
    assert word in str(caught.value)
    assert insides(model) == before


def test_an_unknown_place_is_answered_with_those_that_are_there() -> None:
    with pytest.raises(ConfigurationError) as caught:
        apply_patterns(wide(10, 0.5), {"stage3.7": CONV})
    assert str(caught.value) == (
        "apply_patterns was given a pattern for 'stage3.7'. "
        "The places of the model are stage1.1, stage2.1, stage3.1. "
        "Name one of these places; print(find_places(model)) says why each is there, and what is not reached."
    )


@pytest.mark.parametrize("masked_before", [True, False])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(masked_before: bool) -> None:
    class Stubborn(nn.BatchNorm2d):
        def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no")

    model = nn.Sequential(Block(), Block(nn.Identity()))
    model[1].late = Stubborn(4)
    if masked_before:
        apply_patterns(model, {"stage1.1": CONV, "stage1.2": ConvPattern(0)})
    before = insides(model)
    with pytest.raises(RuntimeError, match="no"):
        apply_patterns(model, {"stage1.1": CONV, "stage1.2": CONV})
    assert insides(model) == before


@pytest.mark.parametrize("function", [find_places, remove_patterns, lambda model: apply_patterns(model, {})])
def test_what_is_no_module_is_refused(function: Any) -> None:
    with pytest.raises(ConfigurationError, match="instance of torch"):
        function("model")


def test_a_layer_that_the_user_placed_stays() -> None:
    own = PatternDropout(ConvPattern(0.25))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), own)
    apply_patterns(model, {"stage1.1": CONV})
    remove_patterns(model)
    assert model[5] is own


def test_it_works_beside_ydrop_and_monte_carlo() -> None:
    network = nn.Sequential(wide(10, 0.5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 3))
    apply_patterns(network, everywhere(network))
    convert_dropout(network)
    engine = YDrop(network)
    x, y = torch.randn(16, 3, 16, 16), torch.zeros(16, dtype=torch.long)
    engine.dry_run(x, y)
    engine.step(x, y)
    assert list(engine.layers) == ["2"]
    assert layers_of(network)[0].training
    network.eval()
    plain = network(x[:2]).softmax(-1)
    dropout: Any = network[2]
    dropout.p = 0.0  # of all that drops, the patterns alone are left
    assert not torch.allclose(monte_carlo(network, x[:2], num_samples=8).probabilities, plain, atol=1e-3)


def test_a_lightning_module_is_a_model_too() -> None:
    holder = Holder(models.resnet18(num_classes=3))
    report = apply_patterns(holder, {f"stage{stage}.{order}": CONV for stage in (1, 2, 3, 4) for order in (1, 2)})
    assert len(report.applied) == 8
    assert type(holder.network.layer1[0].downsample) is PatternDropout
    remove_patterns(holder)
    assert holder.network.layer1[0].downsample is None
    assert "downsample" in vars(holder.network.layer1[0])


def test_bert_takes_patterns_by_block() -> None:
    model = bert(2)
    apply_patterns(model, {"block2.queries": TOKEN})
    masked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert masked == ["encoder.layer.1.attention.self.query"]
