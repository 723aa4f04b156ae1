"""Layers that draw once for all samples of a batch."""

import copy
import warnings
from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    ConvPattern,
    Jumpout,
    PatternDropout,
    TokenPattern,
    YDropCallback,
    monte_carlo,
)


def driven(layer: ConductanceDropout) -> ConductanceDropout:
    layer.update(torch.tensor([0.0, 0.2, 0.8]), elasticity=1.0, initial_drop_prob=0.5)
    return layer


# With the dimension of the samples, and the layer for samples that draw for themselves.
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], int]] = {
    "vanilla": (ConductanceDropout, (64, 3), 0),
    "vanilla, maps": (ConductanceDropout, (64, 3, 5, 5), 0),
    "vanilla, elements": (lambda **each: ConductanceDropout(elementwise=True, **each), (64, 3, 5, 5), 0),
    "vanilla, time first": (lambda **each: ConductanceDropout(unit_dim=-1, batch_dim=1, **each), (5, 64, 3), 1),
    "driven": (lambda **each: driven(ConductanceDropout(**each)), (64, 3), 0),
    "driven, maps": (lambda **each: driven(ConductanceDropout(**each)), (64, 3, 5, 5), 0),
    "driven, time first": (lambda **each: driven(ConductanceDropout(unit_dim=-1, batch_dim=1, **each)), (5, 64, 3), 1),
    "jumpout": (lambda **each: Jumpout(0.3, **each), (64, 3, 5), 0),
    "jumpout, channels": (lambda **each: Jumpout(0.3, granularity="channel", **each), (64, 3, 5), 0),
    "maps": (lambda **each: PatternDropout(ConvPattern(size=0.5), **each), (64, 3, 8, 8), 0),
    "tokens": (lambda **each: PatternDropout(TokenPattern(size=2, stride=2), **each), (64, 16, 3), 0),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_all_samples_have_one_mask_and_each_call_another(kind: str) -> None:
    make, shape, batch_dim = LAYERS[kind]
    layer, x = make(shared_masks=True), torch.ones(shape)
    seen = []
    for _ in range(20):
        masks = layer(x).movedim(batch_dim, 0)
        assert torch.equal(masks, masks[:1].expand_as(masks))
        seen.append(masks[0])
    assert any(not torch.equal(each, seen[0]) for each in seen)
    apart = make()(x).movedim(batch_dim, 0)
    assert not torch.equal(apart, apart[:1].expand_as(apart))
    assert "shared_masks=True" in repr(layer)
    assert "shared_masks" not in repr(make())
    assert layer.eval()(x) is x


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "maps"])
def test_rates_are_those_of_masks_that_are_not_shared(kind: str) -> None:
    make, shape, _ = LAYERS[kind]
    torch.manual_seed(0)
    layer, apart, x = make(shared_masks=True), make(), torch.ones(shape)
    shared = torch.stack([layer(x[:, :2] if "time" in kind else x[:2]) for _ in range(4000)]).mean((0, 1))
    alone = torch.stack([apart(x) for _ in range(200)]).mean((0, 1))
    assert torch.allclose(shared.mean(), alone.mean(), atol=0.05)


def test_units_are_dropped_at_their_own_rates() -> None:
    torch.manual_seed(0)
    layer = driven(ConductanceDropout(shared_masks=True))
    kept = torch.stack([layer(torch.ones(4, 3))[0] for _ in range(4000)]).count_nonzero(0) / 4000
    assert torch.allclose(kept, torch.tensor([1.0, 0.8, 0.2]), atol=0.03)


@pytest.mark.parametrize("is_driven", [False, True])
def test_samples_come_first_in_two_dimensions_wherever_they_are_in_three(is_driven: bool) -> None:
    layer = ConductanceDropout(unit_dim=-1, batch_dim=1, shared_masks=True)
    masks = torch.stack([(driven(layer) if is_driven else layer)(torch.ones(4, 3)) for _ in range(20)])
    assert torch.equal(masks, masks[:, :1].expand_as(masks))
    assert len(masks[:, 0].unique(dim=1)[0]) > 1


def test_inputs_keep_their_dtype_and_may_be_empty() -> None:
    layer = ConductanceDropout(shared_masks=True)
    assert layer(torch.ones(4, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer(torch.ones(0, 3)).shape == (0, 3)
    assert layer(torch.ones(3)).shape == (3,)


@pytest.mark.parametrize("kind", ["vanilla", "driven", "jumpout"])
def test_copies_scripted_and_compiled_layers_share_too(kind: str) -> None:
    make, shape, _ = LAYERS[kind]
    layer = make(shared_masks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for each in (copy.deepcopy(layer), scripted, compiled):
        masks = each(torch.ones(shape))
        assert torch.equal(masks, masks[:1].expand_as(masks))


def test_one_mask_passes_at_a_time_in_an_average() -> None:
    rows: list[int] = []
    model = nn.Sequential(nn.Linear(3, 8), ConductanceDropout(shared_masks=True), nn.Linear(8, 2))
    model[1].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the layer drops at its p
        samples = monte_carlo(model, torch.ones(4, 3), 9, return_samples=True).samples
    assert rows[-9:] == [4] * 9
    assert samples is not None
    assert torch.equal(samples, samples[:, :1].expand_as(samples))


def test_ydrop_drives_it_without_a_warning() -> None:
    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), ConductanceDropout(shared_masks=True), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.net(x)
            return found

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model, data = Model(), TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
    L.Trainer(
        callbacks=[YDropCallback(annealing_epochs=0)],
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    ).fit(model, DataLoader(data, batch_size=8))
    layer = model.net[2]
    assert isinstance(layer, ConductanceDropout)
    assert len(layer.drop_prob) == 8


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_no_flag_is_refused(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="shared_masks=1"):
        LAYERS[kind][0](shared_masks=1)


def test_padding_of_a_samples_own_is_refused() -> None:
    layer = PatternDropout(TokenPattern(size=2), shared_masks=True)
    with pytest.raises(ConfigurationError, match="padding mask"):
        layer(torch.ones(4, 6, 3), torch.zeros(4, 6, dtype=torch.bool))
