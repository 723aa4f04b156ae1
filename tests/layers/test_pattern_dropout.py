import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_ydrop.layers.pattern_dropout as module_of_layer
from lightning_ydrop import ConfigurationError, ConvPattern, PatternDropout, TokenPattern
from lightning_ydrop.functional import make_stencil, stencil_dropout, token_dropout
from lightning_ydrop.functional.runs import WHOLE
from lightning_ydrop.layers.patterns import Pattern

CONV = ConvPattern(0.25, 0.2, 2, 22.5, 0.3, -0.3, rate=0.7)
TOKENS = TokenPattern(2, 3, share_t=True, rate=0.6)
PATTERNS: list[tuple[Pattern, tuple[int, ...]]] = [
    (CONV, (6, 3, 9, 8)),
    (ConvPattern(0.25, share_c=True), (6, 3, 9, 8)),
    (ConvPattern.spatial_dropout(0.5), (6, 3, 9, 8)),
    (TOKENS, (6, 9, 5)),
    (TOKENS, (6, 3, 9, 9)),
    (TokenPattern.word_dropout(0.5), (6, 9, 5)),
]


@pytest.fixture(autouse=True)
def _nothing_of_other_tests() -> None:
    module_of_layer._stencils.clear()
    torch.compiler.reset()


def seeded(call: Any, *args: Any) -> Any:
    torch.manual_seed(4)
    return call(*args)


@pytest.mark.parametrize("share_c", [False, True])
def test_a_conv_pattern_is_its_function_in_training(share_c: bool) -> None:
    x, pattern = torch.randn(6, 4, 9, 8), ConvPattern(0.25, 0.2, 2, 22.5, 0.3, -0.3, share_c, rate=0.7)
    expected = seeded(
        stencil_dropout, x, *make_stencil(9, 8, 0.25, 0.2, 2, 22.5, 0.3, -0.3), torch.tensor(0.7), share_c
    )
    assert torch.equal(seeded(PatternDropout(pattern), x), expected)
    assert (expected == 0).any()


@pytest.mark.parametrize(("size", "run"), [(2, 2), ("all", WHOLE)])
@pytest.mark.parametrize("share_t", [False, True])
@pytest.mark.parametrize("share_c", [False, True])
def test_a_token_pattern_is_its_function_in_training(size: Any, run: int, share_t: bool, share_c: bool) -> None:
    x, padding_mask = torch.randn(6, 9, 5), torch.arange(9).expand(6, 9) >= 7
    layer = PatternDropout(TokenPattern(size, 3, share_t, share_c, 0.6))
    of_function = run, 3, torch.tensor(0.6), share_t, share_c
    assert torch.equal(seeded(layer, x), seeded(token_dropout, x, *of_function))
    assert torch.equal(seeded(layer, x, padding_mask), seeded(token_dropout, x, *of_function, padding_mask))


@pytest.mark.parametrize(("pattern", "shape"), PATTERNS)
def test_each_step_draws_anew_and_evaluation_returns_its_very_input(pattern: Pattern, shape: tuple[int, ...]) -> None:
    layer, x = PatternDropout(pattern), torch.randn(shape)
    assert not torch.equal(layer(x), layer(x))
    state = torch.get_rng_state()
    assert layer.eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "pattern", [ConvPattern(0), ConvPattern(0.5, rate=0), TokenPattern(0), TokenPattern("all", rate=0)]
)
def test_an_empty_pattern_is_the_plain_network_and_draws_nothing(pattern: Pattern) -> None:
    layer, x = PatternDropout(pattern), torch.randn(2, 3, 4, 4)
    state = torch.get_rng_state()
    assert layer(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("pattern", "shape"), PATTERNS)
def test_it_has_no_state_shows_its_pattern_and_can_be_copied(pattern: Pattern, shape: tuple[int, ...]) -> None:
    layer, x = PatternDropout(pattern), torch.randn(shape)
    layer.progress = 0.75
    layer(x)
    assert not layer.state_dict()
    assert not [*layer.parameters(), *layer.buffers(), *layer.children()]
    layer.load_state_dict({})
    assert repr(layer) == f"PatternDropout({pattern!r})"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.pattern == pattern
        assert twin.progress == 0.75
        assert torch.equal(seeded(twin, x), seeded(layer, x))
        twin.progress = 0.0
        assert torch.equal(twin(x), x)
        assert layer.progress == 0.75


@pytest.mark.parametrize("pattern", ["all", None, ConvPattern, 0.5, {"size": 0.5}])
def test_other_things_are_no_patterns(pattern: Any) -> None:
    with pytest.raises(ConfigurationError, match="A pattern is a ConvPattern or a TokenPattern"):
        PatternDropout(pattern)


@pytest.mark.parametrize(
    ("pattern", "shape", "says"),
    [
        (CONV, (4, 8), "A ConvPattern takes feature maps (B, C, H, W), and no padding mask."),
        (CONV, (4, 8, 8), "was called with Tensor(shape=(4, 8, 8), dtype=torch.float32, device=cpu)."),
        (CONV, (2, 4, 8, 8, 8), "or use a TokenPattern for (B, T, C)."),
        (TOKENS, (4, 8), "A TokenPattern takes tokens (B, T, C) or attention weights (B, heads, queries, keys)."),
        (TOKENS, (4, 8, 1, 1, 1), "or use a ConvPattern for maps."),
    ],
)
def test_other_numbers_of_dimensions_are_refused(pattern: Pattern, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        PatternDropout(pattern)(torch.ones(shape))
    assert says in str(error.value)
    assert len(error.value.args) == 3


def test_a_padding_mask_has_to_fit() -> None:
    with pytest.raises(ConfigurationError, match="and no padding mask"):
        PatternDropout(CONV)(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, dtype=torch.bool))
    for wrong in (torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.bool)):
        with pytest.raises(ConfigurationError, match=r"the shape \(2, 3\) and the dtype torch.bool"):
            PatternDropout(TOKENS)(torch.ones(2, 3, 4), wrong)


@pytest.mark.parametrize("share_c", [False, True])
def test_a_pattern_that_covers_the_map_at_rate_1_is_refused_where_it_is_met(share_c: bool) -> None:
    layer = PatternDropout(ConvPattern(0.9, share_c=share_c))
    assert (layer(torch.ones(2, 3, 8, 8)) != 0).any()
    for _ in range(2):
        with pytest.raises(ConfigurationError) as error:
            layer(torch.ones(2, 3, 4, 4))
    assert "ConvPattern(size=0.9, rate=1.0) was applied to maps of 4 x 4." in str(error.value)
    y = PatternDropout(ConvPattern(0.9, share_c=share_c, rate=0.5))(torch.ones(64, 3, 4, 4))
    assert set(y.eq(0).flatten(2).float().mean(2).unique().tolist()) == {0.0, 1.0}


def test_maps_of_one_cell_are_dropped_as_a_whole() -> None:
    x = torch.ones(64, 32, 1, 1)
    with pytest.raises(ConfigurationError, match="maps of 1 x 1"):
        PatternDropout(ConvPattern(0.25))(x)
    y = PatternDropout(ConvPattern(0.25, repeat=3, rotate=30, rate=0.5))(x)
    assert torch.equal(y.unique(), torch.tensor([0, x.numel() / (y != 0).sum()]))


def test_a_batch_of_one_and_an_empty_batch() -> None:
    for pattern, shape in PATTERNS:
        layer = PatternDropout(pattern)
        x = torch.randn(1, *shape[1:])
        y = layer(x)
        kept = y != 0
        assert torch.allclose(y[kept], x[kept] * x.numel() / kept.sum())
        assert layer(torch.ones(0, *shape[1:])).shape == (0, *shape[1:])


def test_a_stencil_is_made_once_for_each_size_of_map(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def count(height: int, width: int, *geometry: Any) -> Any:
        made.append((height, width))
        return make_stencil(height, width, *geometry)

    monkeypatch.setattr(module_of_layer, "make_stencil", count)
    layer = PatternDropout(CONV)
    for _ in range(3):
        for height, width in ((8, 8), (8, 6), (6, 8), (1, 1)):
            y = layer(torch.ones(20, 4, height, width))
            assert (y == 0).any()
        PatternDropout(CONV)(torch.ones(2, 4, 8, 8))
    assert made == [(8, 8), (8, 6), (6, 8), (1, 1)]


def test_the_number_of_stencils_kept_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_layer, "MOST_STENCILS", 3)
    for side in (4, 5, 6, 7):
        PatternDropout(CONV)(torch.ones(2, 4, side, side))
    assert [key[0] for key in module_of_layer._stencils] == [5, 6, 7]


def test_a_stencil_made_in_inference_mode_serves_training() -> None:
    layer = PatternDropout(ConvPattern(0.25))
    with torch.inference_mode():
        layer(torch.ones(2, 3, 8, 8))
    x = torch.ones(2, 3, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("pattern", "shape"), PATTERNS)
def test_the_rate_warms_up_with_progress(pattern: Pattern, shape: tuple[int, ...]) -> None:
    layer, x = PatternDropout(pattern), torch.ones(2000, *shape[1:])
    assert layer.progress == 1.0
    shares = []
    for progress in (0, 0.25, 0.5, 1):
        layer.progress = progress
        assert layer.progress == progress
        shares.append(seeded(layer, x).eq(0).float().mean())
    assert shares[0] == 0
    for progress, share in zip((0.25, 0.5), shares[1:3], strict=True):
        # Three standard errors of a share, if all of a sample depended on one draw, with four times the sample's worth.
        assert abs(share / shares[3] - progress) < 0.12
    for wrong in (-0.1, 1.1, None, "half"):
        with pytest.raises(ConfigurationError, match=r"PatternDropout\(progress="):
            layer.progress = wrong  # type: ignore[assignment]


def test_progress_follows_the_model_to_other_dtypes_and_devices() -> None:
    layer = PatternDropout(ConvPattern(0.5))
    layer.progress = 1 / 3
    layer.half()
    assert layer._applied_progress.dtype == torch.float32
    assert layer._applied_progress == torch.tensor(1 / 3)
    layer.to("meta")
    assert layer(torch.ones(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)
    layer.to_empty(device="cpu")
    assert layer._applied_progress == torch.tensor(1 / 3)
    with torch.inference_mode():
        made_there = PatternDropout(ConvPattern(0.5))
    made_there.progress = 0.5


@pytest.mark.parametrize(("pattern", "shape"), PATTERNS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_network_with_it_is_one_graph_without_recompilation(
    pattern: Pattern, shape: tuple[int, ...], backend: str
) -> None:
    graphs: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    layers = [PatternDropout(pattern), PatternDropout(pattern)]
    network = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    compiled = torch.compile(network, backend=compiler, fullgraph=True)
    x = torch.randn(shape, requires_grad=True)
    for progress in (1.0, 0.9, 0.5, 0.0):
        for layer in layers:
            layer.progress = progress
        y = seeded(compiled, x)
        assert torch.equal(y, seeded(network, x))
        y.sum().backward()
    assert torch.equal(y, x.tanh())
    assert len(graphs) == 1
    network.eval()
    assert torch.equal(compiled(x), x.tanh())


@pytest.mark.parametrize(("pattern", "shape"), PATTERNS)
def test_compiled_code_takes_maps_and_batches_of_other_sizes(pattern: Pattern, shape: tuple[int, ...]) -> None:
    network = nn.Sequential(PatternDropout(pattern))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for batch_size, longer in ((6, 0), (5, 0), (4, 3), (3, 5), (3, 0)):
        x = torch.randn(batch_size, *shape[1:-1], shape[-1] + longer)
        assert torch.equal(seeded(compiled, x), seeded(network, x))


def test_layers_with_other_patterns_share_no_graph() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = (0.1, 0.2, 0.3, 0.4, 0.45)
            self.layers = nn.ModuleList(PatternDropout(ConvPattern(size, rate=1 - size)) for size in sizes)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    network, x = Network(), torch.randn(4, 3, 20, 20)
    assert torch.equal(seeded(torch.compile(network, backend="aot_eager", fullgraph=True), x), seeded(network, x))
    for layer in network.layers:
        y = seeded(torch.compile(layer, backend="aot_eager", fullgraph=True), x)
        assert torch.equal(y, seeded(layer, x))


@pytest.mark.parametrize(("pattern", "shape"), PATTERNS)
def test_autocast_keeps_half_precision(pattern: Pattern, shape: tuple[int, ...]) -> None:
    layer = PatternDropout(pattern)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(shape, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_layer_that_is_read_from_a_file_can_be_compiled_in_a_process_that_made_none() -> None:
    torch.save(PatternDropout(ConvPattern(size=0.5)), "layer.pt")
    code = """
import torch
layer = torch.load("layer.pt", weights_only=False)
compiled = torch.compile(layer, backend="eager", fullgraph=True)
assert (compiled(torch.ones(2, 3, 8, 8)) == 0).sum() == 2 * 3 * 16
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
