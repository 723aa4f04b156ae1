"""Where masks come from: a generator, the same for all samples, or one seed for all ranks."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from lightning import seed_everything
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_ydrop import ConductanceDropout, ConfigurationError, ConvPattern, Jumpout, PatternDropout, monte_carlo
from lightning_ydrop.uncertainty.streams import seeded, seeds_obeyed, warn_of_equal_ranks

WIDTH = 6


def perceptron() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Dropout(), nn.Linear(WIDTH, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=2.0)
    return model


def seeded_generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streams() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002


@pytest.mark.parametrize("shared_masks", [False, True])
def test_a_generator_makes_masks_repeatable_and_leaves_the_streams_alone(shared_masks: bool) -> None:
    model, x, before = perceptron(), torch.randn(4, 3), streams()

    def samples(generator: torch.Generator) -> Tensor:
        found = monte_carlo(model, x, 9, generator=generator, shared_masks=shared_masks, return_samples=True)
        assert found.samples is not None
        return found.samples

    generator = seeded_generator()
    first, second = samples(generator), samples(generator)
    assert torch.equal(samples(seeded_generator()), first)
    assert not torch.equal(second, first)  # it moves on
    assert not torch.equal(samples(seeded_generator(4)), first)
    assert streams() == before


def test_the_generators_masks_are_those_of_no_generator() -> None:
    model, x = perceptron(), torch.full((1, 3), 2.0)
    found = monte_carlo(model, x, 20_000, generator=seeded_generator()).probabilities
    assert torch.allclose(found, monte_carlo(model, x, 20_000).probabilities, atol=0.02)


def test_without_a_generator_masks_follow_from_torchs_seed() -> None:
    model, x = perceptron(), torch.randn(4, 3)
    averages = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        averages.append(monte_carlo(model, x, 9, shared_masks=True).probabilities)
        averages.append(monte_carlo(model, x, 9, shared_masks=True).probabilities)
    assert torch.equal(averages[0], averages[2])
    assert not torch.equal(averages[0], averages[4])
    assert not torch.equal(averages[0], averages[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_streams_are_given_back_after_an_error(error: type[BaseException]) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(len(x))
            if len(x) > 2:
                raise error("no")
            return x

    before, model = streams(), nn.Sequential(nn.Dropout(), Failing())
    for shared_masks in (False, True):
        with pytest.raises(error, match="no"):
            monte_carlo(model, torch.ones(2, 3), 9, generator=seeded_generator(), shared_masks=shared_masks)
        assert model.training
        assert model[0].training
    assert streams() == before


class NumpyDropout(nn.Dropout):
    """Drops columns for each sample, as NumPy draws them."""

    def forward(self, x: Tensor) -> Tensor:
        kept = np.random.rand(*x.shape) > self.p  # noqa: NPY002
        return x * torch.from_numpy(kept).float() if self.training else x


class DropConnect(nn.Module):
    """Drops weights in a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, weight: Tensor) -> Tensor:
        dropped: Tensor = self.drop(weight)
        return dropped


def drop_connect() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", DropConnect())
    return nn.Sequential(layer, nn.Dropout(0.2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, WIDTH, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.lstm(x[:, :, None])[0][:, -1]
        return last


class Spatial(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        maps = x[:, :, None, None].expand(-1, -1, 5, 5)
        dropped: Tensor = self.layer(maps)
        return dropped[:, :, 0, 0] + dropped[:, :, 4, 4]


def driven() -> nn.Module:
    layer = ConductanceDropout()
    layer.update(torch.linspace(0.1, 0.9, WIDTH), elasticity=0.5, initial_drop_prob=0.2)
    return layer


LAYERS: dict[str, Callable[[], Any]] = {
    "dropout": nn.Dropout,
    "driven": driven,
    "jumpout": Jumpout,
    "alpha": nn.AlphaDropout,
    "channels": lambda: Spatial(nn.Dropout2d()),
    "pattern": lambda: Spatial(PatternDropout(ConvPattern(0.4))),
    "weights": drop_connect,
    "recurrent": Recurrent,
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True, dropout=0.3), nn.Flatten()
    ),
    "numpy": NumpyDropout,
    "compiled": lambda: torch.compile(nn.Sequential(nn.Dropout(), nn.ReLU()), backend="eager"),
}


@pytest.mark.filterwarnings("ignore:monte_carlo was given")
@pytest.mark.parametrize("max_rows", [1, 4, None])
@pytest.mark.parametrize("layer", LAYERS)
def test_shared_masks_are_the_same_for_every_sample_and_another_each_time(layer: str, max_rows: int | None) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), LAYERS[layer](), nn.Linear(WIDTH, 2))
    x = torch.rand(1, 3).expand(5, 3) + 1.0
    found = monte_carlo(model, x, 12, shared_masks=True, max_rows=max_rows, return_samples=True)
    assert found.samples is not None
    assert (found.samples - found.samples[:, :1]).abs().max() < 1e-6
    assert len({tuple(sample) for sample in found.samples[:, 0].tolist()}) > 1
    own = monte_carlo(model, x, 12, return_samples=True).samples
    assert own is not None
    assert (own - own[:, :1]).abs().max() > 1e-4


def test_with_shared_masks_each_mask_is_one_network() -> None:
    """Of a linear network the outputs of a mask are linear in the inputs, whatever the mask is."""
    model = nn.Sequential(nn.Linear(3, WIDTH, bias=False), nn.Dropout(), nn.Linear(WIDTH, 2, bias=False))
    a, b = torch.randn(2, 3)
    found = monte_carlo(
        model, torch.stack([a, b, a + b]), 40, task="regression", shared_masks=True, return_samples=True
    )
    assert found.samples is not None
    first, second, both = found.samples.unbind(1)
    assert torch.allclose(first + second, both, atol=1e-5)
    assert float(first.std(0).min()) > 0.01


@pytest.mark.usefixtures("rows_known_apart")
def test_shared_masks_pass_sample_by_sample_with_many_masks_at_once() -> None:
    model, passes = perceptron(), []
    model[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    monte_carlo(model, torch.ones(3, 3), 7, max_rows=5, shared_masks=True)
    assert passes == [1, 2, *[5, 2] * 3]  # what all rows share is found out first


def test_what_all_samples_share_goes_with_each_of_them() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: Tensor, table: Tensor, scale: Tensor) -> Tensor:
            assert table.shape == (7, 2)
            logits: Tensor = self.drop(x) @ table[:3] * scale
            return logits

    x, table = torch.randn(4, 3), torch.randn(7, 2)
    found = monte_carlo(Masked(), (x, table, torch.tensor(2.0)), 3, shared_masks=True, max_rows=None)
    assert found.probabilities.shape == (4, 2)


@pytest.mark.usefixtures("rows_known_apart")
def test_half_as_many_masks_pass_where_a_gpu_has_no_memory_and_they_stay_the_same_for_all() -> None:
    model, passes = perceptron(), []

    def allocate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        passes.append(len(args[0]))
        if len(args[0]) > 3:
            torch.rand(2)  # what a pass that fails has drawn must not matter
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(allocate)
    x = torch.ones(3, 3)
    found = monte_carlo(model, x, 8, max_rows=8, shared_masks=True, return_samples=True)
    assert passes == [1, 2, 8, 4, *[2, 2, 2, 2] * 3]
    assert found.samples is not None
    assert torch.equal(found.samples[:, 0], found.samples[:, 2])


def test_other_generators_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"generator=3\) was given.*torch.Generator\(\)\.manual_seed"):
        monte_carlo(perceptron(), torch.ones(1, 3), 2, generator=3)  # type: ignore[call-overload]


def test_recurrent_layers_that_drop_run_without_cudnn_which_keeps_its_state_whatever_the_seed() -> None:
    def fail(model: nn.Module, devices: list[torch.device]) -> None:
        with seeds_obeyed(model, devices):
            seen.append(torch.backends.cudnn.enabled)
            raise RuntimeError("no")

    seen: list[bool] = []
    cuda = [torch.device("cuda", 0)]
    for model, devices in ((Recurrent(), cuda), (Recurrent(), []), (nn.LSTM(1, 2), cuda)):
        with pytest.raises(RuntimeError, match="no"):
            fail(model, devices)
        assert torch.backends.cudnn.enabled
    assert seen == [False, True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layer", ["dropout", "driven", "jumpout", "channels", "pattern", "recurrent", "attention"])
def test_on_a_gpu_masks_are_shared_and_repeatable_too(layer: str) -> None:
    model = nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), LAYERS[layer](), nn.Linear(WIDTH, 2)).cuda()
    x, before = (torch.rand(1, 3).expand(5, 3) + 1.0).cuda(), torch.cuda.get_rng_state()
    for shared_masks in (True, False):
        first, again = (
            monte_carlo(
                model, x, 12, generator=seeded_generator(), shared_masks=shared_masks, return_samples=True
            ).samples
            for _ in range(2)
        )
        assert first is not None
        assert again is not None
        assert torch.allclose(first, again, atol=1e-6)
        assert ((first - first[:, :1]).abs().max() < 1e-5) == shared_masks
        assert first[:, 0].std(0).max() > 1e-4
    assert torch.equal(torch.cuda.get_rng_state(), before)


# Ranks


@contextmanager
def rank(number: int, world_size: int = 2) -> Iterator[None]:
    with (
        patch("torch.distributed.is_initialized", return_value=True),
        patch("torch.distributed.get_world_size", return_value=world_size),
        patch("torch.distributed.get_rank", return_value=number),
    ):
        yield


@pytest.fixture
def _no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # where Lightning leaves it for other tests
    monkeypatch.delenv("PL_GLOBAL_SEED")


@pytest.mark.usefixtures("_no_seed")
def test_it_warns_where_lightning_gave_all_ranks_one_seed() -> None:
    model, x = perceptron(), torch.ones(1, 3)
    with rank(0):
        monte_carlo(model, x, 2)  # no seed from Lightning
    seed_everything(5, verbose=False)
    monte_carlo(model, x, 2)  # no ranks
    with rank(0), pytest.warns(UserWarning, match="draws the same masks on all ranks: .* seed 5. Pass generator="):
        monte_carlo(model, x, 2)
    with rank(0):
        monte_carlo(model, x, 2, generator=seeded_generator())
    with rank(1):
        monte_carlo(model, x, 2)  # one rank says it
    with rank(0, world_size=1):
        monte_carlo(model, x, 2)
    torch.manual_seed(6)  # another for each rank
    with rank(0):
        monte_carlo(model, x, 2)


@pytest.mark.usefixtures("_no_seed")
def test_a_stream_that_was_given_back_is_still_that_of_its_seed() -> None:
    seed_everything(5, verbose=False)
    with seeded(9, []), rank(0):
        warn_of_equal_ranks("monte_carlo", "")
    with rank(0), pytest.warns(UserWarning, match="same masks on all ranks"):
        warn_of_equal_ranks("monte_carlo", "")
