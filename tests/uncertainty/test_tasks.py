"""What `monte_carlo` says for each task, beside slow loops over masks in float64."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_ydrop import ConfigurationError, monte_carlo
from lightning_ydrop.uncertainty import MonteCarlo, MonteCarloDivergence, MonteCarloMultilabel, MonteCarloRegression

MASKS, ROWS = 23, 5


def network(num_outputs: int, last: nn.Module | None = None) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, num_outputs), last or nn.Identity()
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.0)
    return model.double()


def outputs_one_by_one(model: nn.Module, x: Tensor, max_rows: int | None) -> list[Tensor]:
    """Each mask's output, drawn as `monte_carlo` draws them: one mask, then as many at once as there is room for."""
    at_once = MASKS if max_rows is None else max(1, max_rows // ROWS)
    counts = [1]
    while sum(counts) < MASKS:
        counts.append(min(at_once, MASKS - sum(counts)))
    model.eval()
    model[2].train()  # type: ignore[index]
    outputs: list[Tensor] = []
    with torch.no_grad():
        for count in counts:
            outputs += model(x.repeat(count, *[1] * (x.ndim - 1))).split(ROWS)
    return outputs


def replayed(model: nn.Sequential, x: Tensor, max_rows: int | None, **settings: Any) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(7)
    found = monte_carlo(model, x, MASKS, max_rows=max_rows, **settings)
    torch.manual_seed(7)
    return found, outputs_one_by_one(model, x, max_rows)


def entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities)


AT_ONCE = pytest.mark.parametrize("max_rows", [1, 17, None])


@AT_ONCE
def test_classes(max_rows: int | None) -> None:
    x = torch.randn(ROWS, 3, dtype=torch.float64)
    found, outputs = replayed(network(4), x, max_rows)
    assert isinstance(found, MonteCarlo)
    for row in range(ROWS):
        each = [output[row].softmax(0).tolist() for output in outputs]
        average = [statistics.fmean(probabilities) for probabilities in zip(*each, strict=True)]
        expected = statistics.fmean(map(entropy, each))
        assert found.mean[row].tolist() == pytest.approx(average)
        assert float(found.entropy[row]) == pytest.approx(entropy(average))
        assert float(found.expected_entropy[row]) == pytest.approx(expected)
        assert float(found.mutual_information[row]) == pytest.approx(entropy(average) - expected)
    assert found.mean is found.probabilities
    assert float(found.mutual_information.min()) > 0.01


@AT_ONCE
def test_labels(max_rows: int | None) -> None:
    x = torch.randn(ROWS, 3, dtype=torch.float64)
    found, outputs = replayed(network(4), x, max_rows, task="multilabel")
    assert isinstance(found, MonteCarloMultilabel)
    for row in range(ROWS):
        for label in range(4):
            each = [1 / (1 + math.exp(-float(output[row, label]))) for output in outputs]
            average = statistics.fmean(each)
            expected = statistics.fmean(entropy([p, 1 - p]) for p in each)
            assert float(found.mean[row, label]) == pytest.approx(average)
            assert float(found.entropy[row, label]) == pytest.approx(entropy([average, 1 - average]))
            assert float(found.expected_entropy[row, label]) == pytest.approx(expected)
            information = entropy([average, 1 - average]) - expected
            assert float(found.mutual_information[row, label]) == pytest.approx(information)


@AT_ONCE
def test_numbers(max_rows: int | None) -> None:
    x = torch.randn(ROWS, 3, dtype=torch.float64)
    found, outputs = replayed(network(2), x, max_rows, task="regression")
    assert isinstance(found, MonteCarloRegression)
    for row in range(ROWS):
        for column in range(2):
            each = [float(output[row, column]) for output in outputs]
            assert float(found.mean[row, column]) == pytest.approx(statistics.fmean(each))
            assert float(found.variance[row, column]) == pytest.approx(statistics.pvariance(each))
    assert found.aleatoric_variance is None
    assert torch.equal(found.variance, found.epistemic_variance)


class Form(nn.Module):
    """The two halves of an output, as a model may return them."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(*x.chunk(2, -1))


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pair": lambda mean, log_variance: (mean, log_variance),
    "list": lambda mean, log_variance: [mean, log_variance],
    "mapping": lambda mean, log_variance: {"log_variance": log_variance, "mean": mean},
    "one tensor": lambda mean, log_variance: torch.cat([mean, log_variance], 1),
}


@AT_ONCE
@pytest.mark.parametrize("form", FORMS)
def test_numbers_with_noise(form: str, max_rows: int | None) -> None:
    x = torch.randn(ROWS, 3, dtype=torch.float64)
    model = network(4)
    _, outputs = replayed(model, x, max_rows, task="regression")
    model[4] = Form(FORMS[form])
    torch.manual_seed(7)
    found = monte_carlo(model, x, MASKS, max_rows=max_rows, task="regression", noise="log_variance")
    assert found.aleatoric_variance is not None
    for row in range(ROWS):
        for column in range(2):
            means = [float(output[row, column]) for output in outputs]
            variances = [math.exp(float(output[row, 2 + column])) for output in outputs]
            # Of the mixture: the mean of its second moments, less the square of its mean.
            second = statistics.fmean(v + m**2 for m, v in zip(means, variances, strict=True))
            assert float(found.aleatoric_variance[row, column]) == pytest.approx(statistics.fmean(variances))
            assert float(found.epistemic_variance[row, column]) == pytest.approx(statistics.pvariance(means))
            assert float(found.variance[row, column]) == pytest.approx(second - statistics.fmean(means) ** 2)


def test_a_variance_is_averaged_as_it_is() -> None:
    x = torch.randn(ROWS, 3)
    model = network(4, Form(lambda mean, spread: (mean, spread.square()))).float()
    torch.manual_seed(7)
    plain = monte_carlo(model, x, MASKS, task="regression", noise="variance", return_samples=True)
    model[4] = Form(lambda mean, spread: (mean, spread.square().log()))
    torch.manual_seed(7)
    logarithm = monte_carlo(model, x, MASKS, task="regression", noise="log_variance")
    assert torch.allclose(plain.variance, logarithm.variance, rtol=1e-4)
    assert plain.variance_samples is not None
    assert torch.allclose(plain.variance_samples.mean(0), plain.variance - plain.epistemic_variance, rtol=1e-4)


def test_means_and_noise_lie_where_class_dim_says() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 4))
    found = monte_carlo(model, torch.randn(5, 7, 3), 3, task="regression", noise="log_variance", class_dim=-1)
    assert found.mean.shape == found.variance.shape == (5, 7, 2)


@pytest.mark.parametrize("max_rows", [1, 50, None])
def test_a_spread_that_is_small_beside_the_mean_is_not_lost(max_rows: int | None) -> None:
    class Far(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 30_000 + x

    found = monte_carlo(
        nn.Sequential(nn.Dropout(), Far()), torch.full((4, 1), 0.5), 200, task="regression", max_rows=max_rows,
        return_samples=True,
    )  # fmt: skip
    assert found.samples is not None
    spread = found.samples.double().var(0, unbiased=False)  # of 0 and 1
    assert float(spread.min()) > 0.2
    assert torch.allclose(found.variance.double(), spread, rtol=2e-2)


@pytest.mark.parametrize("shared_masks", [False, True])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_samples_are_those_that_are_averaged(task: Any, shared_masks: bool) -> None:
    model, x = network(4).float(), torch.randn(ROWS, 3)
    settings: dict[str, Any] = {"task": task, "shared_masks": shared_masks}
    assert monte_carlo(model, x, MASKS, **settings).samples is None
    found = monte_carlo(model, x, MASKS, return_samples=True, **settings)
    assert found.samples is not None
    assert found.samples.shape == (MASKS, ROWS, 4)
    assert torch.allclose(found.samples.mean(0), found.mean, atol=1e-5)
    assert len({tuple(sample) for sample in found.samples[:, 0].tolist()}) == MASKS


def test_masks_that_agree_leave_uncertainty_to_the_data_and_masks_that_do_not_to_the_network() -> None:
    class Wide(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.factor * (x - 0.5), torch.zeros_like(x)], 1)

    x = torch.full((3, 1), 0.5)  # dropout makes it 0 or 1, so class 0 has the logit -factor / 2 or factor / 2
    sure = monte_carlo(nn.Sequential(nn.Dropout(), Wide(200.0)), x, 2_000)
    assert torch.allclose(sure.entropy, torch.tensor(math.log(2)), atol=0.02)
    assert float(sure.expected_entropy.max()) < 1e-30
    assert torch.equal(sure.mutual_information, sure.entropy)
    alike = monte_carlo(nn.Sequential(nn.Dropout(), Wide(0.0)), x, 20)
    assert torch.allclose(alike.expected_entropy, torch.tensor(math.log(2)))
    assert torch.equal(alike.mutual_information < 1e-6, torch.ones(3).bool())
    assert float(alike.mutual_information.min()) >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_are_in_single_precision_at_least(dtype: torch.dtype) -> None:
    model, x = network(4).to(dtype), torch.randn(ROWS, 3, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert monte_carlo(model, x, 3).probabilities.dtype == expected
    assert monte_carlo(model, x, 3, task="multilabel").entropy.dtype == expected
    assert monte_carlo(model, x, 3, task="regression", noise="log_variance").variance.dtype == expected


def test_a_single_logit_is_a_binary_classifier() -> None:
    model = nn.Sequential(network(1), nn.Flatten(0))
    found = monte_carlo(model, torch.randn(ROWS, 3, dtype=torch.float64), 3, task="multilabel")
    assert found.probabilities.shape == found.mutual_information.shape == (ROWS,)


def test_results_move_as_tensors_do() -> None:
    found = monte_carlo(network(4), torch.randn(ROWS, 3, dtype=torch.float64), 3, return_samples=True)
    moved = move_data_to_device([{"average": found}], torch.device("meta"))[0]["average"]
    assert isinstance(moved, MonteCarlo)
    assert moved.samples is not None
    assert {moved.probabilities.device.type, moved.samples.device.type, moved.entropy.device.type} == {"meta"}
    assert moved.num_samples == 3
    assert found.probabilities.device.type == "cpu"


def test_what_was_made_by_hand_knows_no_single_masks() -> None:
    found = MonteCarlo(torch.tensor([[0.5, 0.5]]), 9)
    with pytest.raises(
        ConfigurationError, match=r"MonteCarlo\(probabilities, num_samples\) was made by hand.*entropy_of"
    ):
        _ = found.mutual_information


def test_the_divergence_wants_a_classifier() -> None:
    average = monte_carlo(network(4), torch.randn(ROWS, 3, dtype=torch.float64), 3, task="multilabel")
    with pytest.raises(ConfigurationError, match=r"was given MonteCarloMultilabel\(.*task=\"classification\""):
        MonteCarloDivergence().update(torch.randn(ROWS, 4), average)  # type: ignore[arg-type]


def three(mean: Tensor, noise: Tensor) -> Any:
    return mean, noise, mean


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        (None, {"task": "ranking"}, r"task='ranking'.*'classification', 'regression', 'multilabel'"),
        (None, {"task": "regression", "noise": "std"}, r"noise='std'.*'variance', 'log_variance'"),
        (None, {"noise": "variance"}, r"task='classification', noise='variance'.*Leave noise out"),
        (None, {"task": "regression", "class_dim": -1}, r"task='regression', class_dim=-1.*Leave class_dim out"),
        (None, {"task": "multilabel", "class_dim": 2}, r"task='multilabel', class_dim=2.*Leave class_dim out"),
        (None, {"return_samples": 1}, "return_samples=1"),
        (three, {"task": "regression", "noise": "variance"}, r"tuple\(.*noise='variance'.*It returns a pair"),
        (lambda mean, noise: (mean, noise[:, :1]), {"task": "regression", "noise": "variance"}, "of the same shape"),
        (lambda mean, noise: mean[:, :1], {"task": "regression", "noise": "variance"}, "It returns a pair"),
        (lambda mean, noise: {"mean": mean}, {"task": "regression", "noise": "variance"}, "It returns a pair"),
        (
            lambda mean, noise: (mean, -noise.abs()),
            {"task": "regression", "noise": "variance"},
            r'a variance is negative.*softplus.*noise="log_variance"',
        ),
    ],
)
def test_what_does_not_fit_a_task_is_refused(form: Any, settings: dict[str, Any], message: str) -> None:
    model = network(4, None if form is None else Form(form))
    with pytest.raises(ConfigurationError, match=message):
        monte_carlo(model, torch.randn(ROWS, 3, dtype=torch.float64), 3, **settings)
