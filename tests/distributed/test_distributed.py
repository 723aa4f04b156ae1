"""Real processes: two in every run of the tests, four with `pytest -m slow`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor

from lightning_ydrop import ConfigurationError, YDrop, YDropCallback
from tests.callbacks.test_ydrop import Net, loader, trainer_of
from tests.distributed.train import STRATEGIES, perceptron
from tests.sameness import assert_same

ROOT = Path(__file__).parent.parent.parent
RESUMED = [strategy for strategy in ("default", "fsdp2") if strategy in STRATEGIES]
# With a static graph torch itself fails in the second backward pass without synchronisation: an assertion of its own.
SETUPS = [
    (strategy, accumulate)
    for strategy in STRATEGIES
    for accumulate in (1, 3)
    if (strategy, accumulate) != ("static_graph", 3)
]
MODES = ("on", "observe", "without")
DISTILLED = ("distilled/alike", "distilled/jumpout")
# Four processes take their time where there are but two cores.
FEW = [(strategy, 1) for strategy in RESUMED]
IN_PROCESSES = [
    *(pytest.param("two", *setup, id=f"2 processes-{setup[0]}-{setup[1]}") for setup in SETUPS),
    *(pytest.param("four", *setup, id=f"4 processes-{setup[0]}", marks=pytest.mark.slow) for setup in FEW),
]

Results = dict[str, list[Any]]


def launch(processes: int, folder: Path, *cases: str) -> Results:
    """Run the cases in so many processes, and give what each rank ended with."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
        *("-m", "tests.distributed.train", str(folder), *cases),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PL_GLOBAL_SEED", None)  # where it is set, Lightning gives all ranks the same random stream
    ran = subprocess.run(command, cwd=ROOT, env=environment, timeout=400, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {
        case: [torch.load(folder / f"{case.replace('/', ' ')} {rank}.pt") for rank in range(processes)]
        for case in cases
    }


def train_all(processes: int, folder: Path, setups: Sequence[tuple[str, int]]) -> Results:
    return launch(processes, folder, *(f"{strategy}/{n}/{mode}" for strategy, n in setups for mode in MODES))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return train_all(2, tmp_path_factory.mktemp("two"), SETUPS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return train_all(4, tmp_path_factory.mktemp("four"), FEW)


@pytest.fixture
def results(request: pytest.FixtureRequest, processes: str) -> Results:
    """What ended in so many processes."""
    found: Results = request.getfixturevalue(processes)
    return found


def parameters(ended: dict[str, Any]) -> dict[str, Tensor]:
    """The weights without BatchNorm's statistics, which differ between ranks where buffers are not broadcast."""
    return {name: value for name, value in ended["weights"].items() if "running" not in name}


@pytest.mark.parametrize(("processes", "strategy", "accumulate"), IN_PROCESSES)
def test_all_ranks_hold_the_same(results: Results, strategy: str, accumulate: int) -> None:
    first, *others = results[f"{strategy}/{accumulate}/on"]
    assert first["ydrop"]["steps_taken"] == 52
    for layer in first["ydrop"]["layers"].values():
        assert layer["mean_drop_prob"].std() > 0
    for other in others:
        assert_same(first["ydrop"], other["ydrop"])
        assert_same(parameters(first), parameters(other))
        assert not torch.equal(first["mask"], other["mask"])
        assert not torch.equal(first["samples"], other["samples"])


@pytest.mark.parametrize(("processes", "strategy", "accumulate"), IN_PROCESSES)
def test_observing_changes_nothing(results: Results, strategy: str, accumulate: int) -> None:
    observed, without, driven = (results[f"{strategy}/{accumulate}/{mode}"] for mode in ("observe", "without", "on"))
    for rank, ended in enumerate(observed):
        assert_same(ended["weights"], without[rank]["weights"])
        assert not torch.equal(ended["weights"]["body.0.weight"], driven[rank]["weights"]["body.0.weight"])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Results:
    cases = (case for strategy in RESUMED for case in (f"resumed/{strategy}", f"{strategy}/1/measure"))
    return launch(2, tmp_path_factory.mktemp("others"), "engine", "monitored", *DISTILLED, *cases, "default/1/compiled")


def test_with_a_compiled_phase_1_ranks_do_the_same(two: Results, others: Results) -> None:
    for compiled, eager in zip(others["default/1/compiled"], two["default/1/on"], strict=True):
        for name, value in parameters(eager).items():
            torch.testing.assert_close(compiled["weights"][name], value, rtol=1e-4, atol=1e-5)
        assert compiled["ydrop"]["steps_taken"] == eager["ydrop"]["steps_taken"]


def test_scores_of_two_ranks_are_those_of_one_process_that_sees_both_halves(others: Results) -> None:
    x, y = torch.randn(16, 12, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 5
    alone = YDrop(perceptron(), num_samples=16)
    alone.step(x, y)
    for ended in others["engine"]:
        assert (ended["halves"] - alone.scores["1"]).abs().max() < 1e-6


def test_the_spread_of_all_ranks_is_that_of_all_samples(others: Results) -> None:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    for ended in others["engine"]:
        assert torch.allclose(ended["spread"], x.mean(0), atol=1e-6)


def test_a_layer_that_one_rank_calls_is_driven_on_all(others: Results) -> None:
    first, second = (ended["sometimes"] for ended in others["engine"])
    assert_same(first, second)
    assert len(first["layers"]["more.1"]["drop_prob"]) == 5
    assert first["layers"]["more.1"]["active"]
    assert first["nonfinite"] == 0


def test_a_layer_that_no_rank_calls_stays_what_it_is(others: Results) -> None:
    for ended in others["engine"]:
        assert_same(*ended["called by none"])
        assert ended["called by none, nonfinite"] == 0


def test_ranks_without_samples_follow_the_others(others: Results) -> None:
    first, second = (ended["without samples"] for ended in others["engine"])
    assert_same(first, second)
    x, y = torch.randn(16, 12, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 5
    alone = YDrop(perceptron(), num_samples=16)
    for samples in (slice(0), slice(10)):
        alone.step(x[samples], y[samples])
    assert_same(first["layers"], alone.state_dict()["layers"])
    assert first["steps_taken"] == 3
    assert first["nonfinite"] == 0


def test_what_is_wrong_on_one_rank_is_raised_on_all(others: Results) -> None:
    first, second = others["engine"]
    assert second["labels"].startswith("The target holds classes from 5 to 9")
    assert first["labels"].startswith("Rank 1 cannot run phase 1: The target holds classes from 5 to 9")
    for ended in others["engine"]:
        assert "layers of the same width" in ended["widths"]


@pytest.mark.parametrize("strategy", RESUMED)
def test_measuring_first_changes_nothing(two: Results, others: Results, strategy: str) -> None:
    for measured, without in zip(others[f"{strategy}/1/measure"], two[f"{strategy}/1/without"], strict=True):
        assert_same(measured["weights"], without["weights"])


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(others: Results, strategy: str) -> None:
    for uninterrupted, resumed in others[f"resumed/{strategy}"]:
        assert_same(uninterrupted, resumed)


@pytest.mark.parametrize("student", DISTILLED)
def test_students_are_the_same_on_all_ranks_and_the_teacher_is_what_it_was(others: Results, student: str) -> None:
    first, second = others[student]
    assert_same(first["student"], second["student"])
    assert all(not torch.equal(weights, first["untaught"][name]) for name, weights in first["student"].items())
    # What early stopping and checkpoints go by is the loss of all ranks, whose data differ.
    assert first["logged"].keys() >= {"train_loss", "val_loss"}
    assert_same(dict(first["logged"]), dict(second["logged"]))
    for ended in (first, second):
        assert_same(ended["teacher"], ended["before"])


def test_the_divergence_of_all_ranks_is_that_of_all_samples(others: Results) -> None:
    log_probabilities = torch.tensor([[0.0, 1.0]]).log_softmax(1)
    for ended in others["distilled/alike"]:
        assert torch.allclose(ended["divergence"], -log_probabilities.mean())


def test_what_one_rank_alone_has_measured_is_logged_by_all(others: Results) -> None:
    first, second = others["monitored"]
    assert_same(dict(first["logged"]), dict(second["logged"]))
    for name, mean in first["alone"].items():
        assert first["logged"][f"conductance/{name}/total"].item() == pytest.approx(mean.sum().item(), abs=1e-5)


@pytest.mark.slow
def test_ranks_average_over_masks_of_their_own_and_test_together(tmp_path: Path) -> None:
    first, second = launch(2, tmp_path, "averaged")["averaged"]
    # All samples are the same one, so predictions differ by their masks alone.
    assert torch.equal(first["one seed"], second["one seed"])
    (said,) = first["one seed, warnings"]
    assert said.startswith("MonteCarloCallback draws the same masks on all ranks: seed_everything gave each")
    assert not torch.equal(first["seeds of their own"], second["seeds of their own"])
    assert second["one seed, warnings"] == first["seeds of their own, warnings"] == []
    assert_same(dict(first["logged"]), dict(second["logged"]))
    probabilities = torch.stack([first["probabilities"], second["probabilities"]], 1).flatten(
        0, 1
    )  # as they were dealt
    target = torch.arange(32) % 5
    assert float(first["logged"]["accuracy"]) == pytest.approx(
        float((probabilities.argmax(1) == target).float().mean())
    )
    nll = -float(probabilities[range(32), target].log().mean())
    assert float(first["logged"]["loss"]) == pytest.approx(nll, rel=1e-5)


def test_tensor_parallelism_is_refused(others: Results) -> None:
    for ended in others["engine"]:
        assert "ModelParallelStrategy(tensor_parallel_size=2)" in ended["tensor parallel"]


class DeepSpeedStrategy(DDPStrategy):
    """Has the name of the one that needs deepspeed, and its base."""


class XLAStrategy(DDPStrategy):
    """Has the name of the one that needs torch_xla, and its base."""


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy, r"Trainer with FSDPStrategy\. FSDP1 .*ModelParallelStrategy\(tensor_parallel_size=1\)"),
        (DeepSpeedStrategy, r"Trainer with DeepSpeedStrategy\. DeepSpeed .*strategy=\"ddp\""),
        (XLAStrategy, r"Trainer with XLAStrategy\. XLA .*strategy=\"ddp\""),
    ],
)
def test_strategies_that_phase_1_cannot_work_under_are_refused(strategy: Any, message: str) -> None:
    callback, net = YDropCallback(annealing_epochs=0), Net()
    trainer = trainer_of(callback)

    class Other(Trainer):
        @property
        def strategy(self) -> Any:
            return strategy()

    trainer.__class__ = Other
    with pytest.raises(ConfigurationError, match=message):
        callback.setup(trainer, net, "fit")
    callback.setup(trainer, net, "test")
    trainer_of(callback, max_epochs=1).fit(net, loader())  # nothing was spoilt
