"""Batches whose samples are not in the first dimension, or influence each other."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ydrop import ConfigurationError, MonteCarloCallback, monte_carlo
from tests.uncertainty.test_streams import seeded_generator


class DropoutOfSamples(nn.Dropout):
    """Draws sample by sample, wherever the samples are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, 0).contiguous()).movedim(0, 1) if x.ndim == 3 else super().forward(x)


class Recurrent(nn.Module):
    """Takes (T, B, F), and gives (T, B, C), or (B, C) of the last state."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.rnn, self.drop, self.head = nn.GRU(3, 8), DropoutOfSamples(0.4), nn.Linear(8, 4)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        found: Tensor = self.head(self.drop(states[-1] if self.last else states))
        return found


class SamplesFirst(nn.Module):
    """The same, with the samples first everywhere."""

    def __init__(self, model: Recurrent) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x.movedim(0, 1))
        return found if self.model.last else found.movedim(1, 0)


SETTINGS = [
    {"class_dim": -1},
    {"task": "multilabel"},
    {"task": "regression"},
    {"task": "regression", "noise": "log_variance", "class_dim": -1},
]


@pytest.mark.parametrize("shared_masks", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_results_are_those_of_a_model_with_the_samples_first(
    settings: dict[str, Any], last: bool, shared_masks: bool
) -> None:
    model, x = Recurrent(last), torch.randn(7, 5, 3)
    several: dict[str, Any] = {"shared_masks": shared_masks, "return_samples": True, "max_rows": 10, **settings}
    found = monte_carlo(model, x, 9, batch_dim=1, generator=seeded_generator(), **several)
    first = monte_carlo(SamplesFirst(model), x.movedim(0, 1), 9, generator=seeded_generator(), **several)
    assert len(found.mean) == 5
    assert torch.allclose(found.mean, first.mean, atol=1e-6)
    assert found.samples is not None
    assert torch.allclose(found.samples, first.samples, atol=1e-6)


def test_other_arguments_have_their_samples_where_they_have_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.drop = nn.GRU(3, 4), nn.Dropout()

        def forward(self, x: Tensor, start: Tensor, ids: Tensor, shared: Tensor) -> Tensor:
            assert x.shape[1:] == (len(ids), 3)
            assert start.shape == (1, len(ids), 4)
            assert shared.shape == (7,)
            states, _ = self.rnn(x, start)
            return self.drop(states[-1]) + ids[:, None]

    x, start = torch.randn(7, 5, 3), torch.zeros(1, 5, 4)
    inputs = (x, start, torch.arange(5), torch.zeros(7))
    found = monte_carlo(Model(), inputs, 20, batch_dim=1, task="regression").mean
    assert found.shape == (5, 4)
    assert (found - torch.arange(5)[:, None]).abs().max() < 2.5


@pytest.mark.parametrize("steps", [5, 7])
@pytest.mark.parametrize("last_dim", [False, True])
@pytest.mark.parametrize("form", [tuple, dict])
def test_pairs_of_means_and_noise_have_no_dimension_of_classes(steps: int, last_dim: bool, form: type) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.drop, self.head = nn.GRU(3, 8), DropoutOfSamples(0.4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            mean, noise = (
                each if last_dim else each[..., 0] for each in self.head(self.drop(self.rnn(x)[0])).chunk(2, -1)
            )
            return (mean, noise) if form is tuple else {"mean": mean, "log_variance": noise}

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.outputs = Pair(), list[Any]()

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.outputs.append(self(batch))

    module, x = Module(), torch.randn(steps, 5, 3)
    settings: dict[str, Any] = {"task": "regression", "noise": "log_variance", "batch_dim": 1}
    found = monte_carlo(module, x, 9, generator=seeded_generator(), **settings)
    assert found.mean.shape == found.variance.shape == ((5, steps, 1) if last_dim else (5, steps))
    exact = module.net.eval()(x)[0 if form is tuple else "mean"]
    assert (found.mean.movedim(0, 1) - exact).abs().max() < (found.mean - found.mean.mean(0)).abs().max()
    trainer(**settings).test(module, loader(x, steps), verbose=False)
    (output,) = module.outputs
    assert output[0 if form is tuple else "mean"].shape == exact.shape


class Module(L.LightningModule):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net: nn.Module = Recurrent(**settings)
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.outputs.append(self(batch))


def loader(x: Tensor, batch_size: int) -> DataLoader[Any]:
    return DataLoader(list(x), batch_size=batch_size)  # type: ignore[arg-type]


def trainer(**settings: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**quiet, callbacks=[MonteCarloCallback(9, seed=1, **settings)])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_callback_gives_back_what_looks_like_the_models_output(settings: dict[str, Any], last: bool) -> None:
    module, data = Module(last=last), loader(torch.randn(14, 5, 3), 7)
    averages: Any = trainer(batch_dim=1, **settings).predict(module, data)
    trainer(batch_dim=1, **settings).test(module, data, verbose=False)
    output, average = module.outputs[0], averages[0]
    assert output.shape == (5, 4) if last else (7, 5, 4)
    first = output if last else output.movedim(1, 0)
    read = {"multilabel": torch.sigmoid, "regression": lambda x: x}.get(
        settings.get("task", ""), lambda x: x.softmax(-1)
    )
    if "noise" in settings:
        first = first[..., :2]
    expected = average.mean.movedim(1, -1) if "task" not in settings else average.mean
    assert torch.allclose(read(first), expected, atol=1e-5)


def test_a_dimension_of_samples_and_classes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"class_dim=1 and batch_dim=1.*class_dim=-1"):
        monte_carlo(Recurrent(), torch.randn(7, 5, 3), 9, batch_dim=1)
    assert monte_carlo(Recurrent(last=True), torch.randn(7, 5, 3), 9, batch_dim=1).probabilities.shape == (5, 4)
    with pytest.raises(ConfigurationError, match=r"batch_dim=3.*At least one tensor has this dimension"):
        monte_carlo(Recurrent(), torch.randn(7, 5, 3), 9, batch_dim=3)
    dims: list[Any] = [-1, 0.5, True]
    for dim in dims:
        with pytest.raises(ConfigurationError, match=f"batch_dim={dim}"):
            monte_carlo(Recurrent(), torch.randn(7, 5, 3), 9, batch_dim=dim)


# Samples that influence each other.


class ByTheBatch(nn.Module):
    """Normalises by the batch at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return x - x.mean(0)


@pytest.mark.parametrize("rows", [1, 4])
def test_one_mask_passes_at_a_time_where_what_passes_is_no_batch_of_samples(rows: int) -> None:
    model, x, passes = Recurrent(), torch.randn(rows, 5, 3), list[int]()
    model.drop.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    with pytest.warns(UserWarning, match=r"Recurrent gives a sample another output.*one mask.*pass batch_dim=1 to"):
        found = monte_carlo(model, x, 9, class_dim=-1)
    assert passes[-9:] == [rows] * 9
    assert found.probabilities.shape == (rows, 4, 5)


def test_a_network_that_normalises_by_the_batch_is_averaged_over_masks_of_its_own_batch() -> None:
    model, x = ByTheBatch(), torch.randn(6, 3)
    with pytest.warns(UserWarning, match="ByTheBatch gives a sample another output"):
        found = monte_carlo(model, x, 9, return_samples=True, task="regression")
    assert found.samples is not None
    assert torch.allclose(found.samples.mean(1), torch.zeros(9, 3), atol=1e-6)  # the mean of each mask's batch


def test_samples_that_influence_each_other_have_no_shared_masks() -> None:
    with pytest.raises(ConfigurationError, match=r"ByTheBatch gives .* each sample passes alone"):
        monte_carlo(ByTheBatch(), torch.randn(6, 3), 9, shared_masks=True, task="regression")
    with pytest.raises(ConfigurationError, match="pass batch_dim=0 to"):
        monte_carlo(
            SamplesFirst(Recurrent()), torch.randn(6, 7, 3), 9, shared_masks=True, task="regression", batch_dim=1
        )


def test_a_model_that_takes_batches_of_one_size_gets_them() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x.view(6, 3))

    assert monte_carlo(Fixed(), torch.randn(6, 3), 9).probabilities.shape == (6, 3)


def test_a_model_that_draws_in_evaluation_too_passes_many_masks_at_once() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.drop(x), training=True)

    model, passes = Always(), list[int]()
    model.drop.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    monte_carlo(model, torch.randn(6, 3), 9)
    assert 48 in passes


@pytest.mark.parametrize("settings", [{}, {"shared_masks": True}, {"task": "regression", "return_samples": True}])
def test_a_batch_without_samples_is_predicted_too(settings: dict[str, Any]) -> None:
    class Batches(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            return torch.randn((4, 0, 2)[index], 3)

    class Points(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Dropout(), nn.Linear(3, 4))

    averages: Any = trainer(**settings).predict(Points(), DataLoader(Batches(), batch_size=None))
    assert [tuple(each.mean.shape) for each in averages] == [(4, 4), (0, 4), (2, 4)]
    assert not torch.equal(averages[2].mean[0], averages[2].mean[1])
    module = Points()
    trainer(**settings).test(module, DataLoader(Batches(), batch_size=None), verbose=False)
    assert [len(output) for output in module.outputs] == [4, 0, 2]
    with pytest.raises(ConfigurationError, match="at least one sample"):
        monte_carlo(module, torch.ones(0, 3), 9)


@pytest.mark.parametrize("settings", [{}, {"task": "multilabel"}, {"task": "regression"}])
def test_in_half_precision_the_average_has_the_dtype_of_the_models_output(settings: dict[str, Any]) -> None:
    class Half(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Dropout(), nn.Linear(3, 4))
            self.next = nn.Linear(4, 1)

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.outputs.append(self.next(self(batch)))

    module = Half()
    callback = MonteCarloCallback(9, seed=1, **settings)
    L.Trainer(
        precision="bf16-true", callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu"
    ).test(module, loader(torch.randn(8, 3), 4), verbose=False)
    assert {output.dtype for output in module.outputs} == {torch.bfloat16}
