"""The benchmarks run, and measure what they say."""

import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    budget,
    compiled,
    distillation,
    fidelity,
    gpu,
    growth,
    host,
    layers,
    mask,
    measures,
    memory,
    patterns,
    ranks,
    report,
    search,
    step,
    trade,
)
from benchmarks.measuring import interleaved, quartiles, ratios
from benchmarks.networks import ACTIVATIONS
from lightning_ydrop import ConductanceDropout


@pytest.fixture(autouse=True)
def settings_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def rows_of(file: Path) -> list[dict[str, Any]]:
    found = json.loads(file.read_text())
    assert found["hardware"]["cpu"]
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def test_runs_are_timed_in_turn() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    runs = {"short": lambda: run("short", 0.01), "long": lambda: run("long", 0.03)}
    seconds = interleaved(runs, rounds=5, device=torch.device("cpu"), warm_up=1)
    assert [len(values) for values in seconds.values()] == [5, 5]
    assert {tuple(sorted(order[at : at + 2])) for at in range(0, 12, 2)} == {("long", "short")}
    assert order.count("long") == 6
    found = ratios(seconds, "short")
    assert found["short"] == 1
    assert found["long"] > 1.2
    low, high = quartiles(seconds, "long", "short")
    assert 1.2 < low <= high


def test_the_layer_keeps_a_byte_of_each_element(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: module)
    mask.main(rounds=2, shapes=((64, 128), (4, 8, 6, 6)))
    rows = rows_of(results / "mask-cpu.json")
    features, positions, channels = (row for row in rows if row["layer"] == "ConductanceDropout")
    assert [row["against"] for row in (features, positions, channels)] == ["Dropout", "Dropout", "Dropout2d"]
    # Of Jumpout a byte of mask, and one scale for all.
    assert [row["bytes kept"] for row in rows if row["layer"] == "Jumpout"] == [1 + 4 / 8192, 1 + 4 / 1152, 4 / 36]
    assert features["bytes kept"] == 1 + 4 / 64  # a byte of mask, and a scale for each unit
    assert positions["bytes kept"] == pytest.approx(1 + 4 / 4 / 36)
    assert channels["bytes kept"] == pytest.approx(4 / 36)
    assert all(row["eager"] > 0 for row in rows)


def test_dropout_of_a_pattern_is_timed_against_torchs(results: Path) -> None:
    patterns.main(rounds=2, maps=((4, 8, 16, 16),), tokens=((4, 12, 8),), compiled=False)
    rows = {(tuple(row["shape"]), row["layer"]): row for row in rows_of(results / "patterns-cpu.json")}
    maps, tokens = (4, 8, 16, 16), (4, 12, 8)
    assert len(rows) == 3 + len(patterns.PATTERNS) + 1 + len(patterns.TOKEN_PATTERNS)
    assert rows[maps, "per channel"]["bytes kept"] == 4  # a mask of float32
    assert rows[maps, "shared"]["bytes kept"] == 4 / 8
    assert rows[maps, "SpatialDropout"]["bytes kept"] == 4 / 256
    assert rows[tokens, "plain"]["bytes kept"] == 1 + 4 / 384
    assert rows[tokens, "words"]["bytes kept"] == 4 / 8
    assert all(row["ms"] > 0 and row["against F.dropout"] > 0 for row in rows.values())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    case = step.Case(lambda dropout: nn.Sequential(nn.Linear(12, 16), dropout(), nn.ReLU(), nn.Linear(16, 10)), (12,))
    monkeypatch.setitem(step.CASES, "small", case)
    monkeypatch.setitem(memory.CASES, "small", case)
    monkeypatch.setitem(gpu.CASES, "small", case)
    return "small"


@pytest.mark.parametrize("loop", ["bare", pytest.param("trainer", marks=pytest.mark.slow)])
def test_steps_are_compared(loop: str, results: Path, small: str) -> None:
    step.main(networks=[small], loops=[loop], seconds_for_each=0.1)
    (row,) = rows_of(results / "step-cpu.json")
    # 61 rows of both products forward, and of the second one's inputs backward; against 64 rows, the inputs and weights
    # of the second product backward and the weights of the first.
    phase1, training = 61 * (12 * 16 + 2 * 16 * 10), 64 * (2 * 12 * 16 + 3 * 16 * 10)
    assert row["floor"] == pytest.approx(1 + phase1 / training)
    assert row["paper/captum"] == row["paper"] / row["captum"]
    assert min(row["none"], row["recommended"], row["dropout ms"]) > 0


ROWS = [
    {"network": "a", "rounds": 3, "ratio": 1.0, "ms": 5.0},
    {"network": "b", "rounds": 3, "ratio": 2.0, "ms": 1.0},
]


def said_of(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], **settings: object) -> str:
    report.write_report("anything", torch.device("cpu"), settings, rows)
    return capsys.readouterr().out


def test_what_got_slower_since_the_last_record_is_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no earlier record of this kind of machine" in said_of(ROWS, capsys)
    changed = [
        ROWS[1] | {"ratio": 3.0, "ms": 0.5},
        ROWS[0] | {"ratio": 1.2, "ms": 5.1},
        {"network": "c", "rounds": 3, "ratio": 9.0, "ms": 1.0},
    ]
    said = said_of(changed, capsys).partition("Compared with the last record")[2]
    slower, faster = said.split("Smaller:")
    assert f"{torch.get_num_threads()} threads), of 20" in slower
    assert slower.index("b, 3: ratio was 2, is 3 (+50%)") < slower.index("a, 3: ratio was 1, is 1.2 (+20%)")
    assert "slower where it is a time" in slower
    assert faster.strip() == "b, 3: ms was 1, is 0.5 (-50%)"
    assert "No figure differs by more than 10%" in said_of(changed, capsys)
    assert "setting rounds: was None, is 9" in said_of(changed, capsys, rounds=9)


def test_each_kind_of_machine_has_its_last_record(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said_of(ROWS, capsys)
    monkeypatch.setattr(report, "_cpu", lambda: "Another (R) CPU")
    assert "no earlier record of this kind of machine (Another (R) CPU, " in said_of([ROWS[0] | {"ratio": 7.0}], capsys)
    (other,) = (results / "other_machines").iterdir()
    assert rows_of(other) == ROWS
    monkeypatch.undo()
    monkeypatch.setattr(report, "RESULTS", results)
    assert "No figure differs" in said_of(ROWS, capsys)
    (other,) = (results / "other_machines").iterdir()
    assert other.name.startswith("anything-cpu-another-r-cpu-")
    assert rows_of(results / "anything-cpu.json") == ROWS


def test_a_benchmark_that_writes_row_by_row_compares_with_what_was_there_before(
    results: Path, small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    took = iter([1.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(gpu, "measure", lambda *args: {"paper": next(took)})
    for _ in range(2):
        gpu.main(networks=[small], modes=["bf16", "16"], compiled=[], device="cpu")
    assert "small, 16: paper was 1, is 2 (+100%)" in capsys.readouterr().out


def test_every_measure_is_timed(results: Path, small: str) -> None:
    measures.main(networks=[small], rounds=2)
    (row,) = rows_of(results / "measures-cpu.json")
    assert all(row[name] > 0 for name in measures.MEASURES)


def test_what_takes_a_gpu_runs_without_one_as_far_as_it_can(
    results: Path, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    gpu.main(networks=[small, "unknown"], modes=["bf16"], compiled=[], device="cpu")
    row, failed = rows_of(results / "gpu-cpu.json")
    assert (row["network"], row["mode"], row["failed"]) == ("small", "bf16", "")
    assert min(row["dropout ms"], row["paper"], row["every 4"], row["host ms of phase 1"]) > 0
    assert "unknown" in failed["failed"]


def test_masks_in_one_pass_are_timed_against_as_many_passes(results: Path, small: str) -> None:
    distillation.main(networks=[small], num_masks=(1, 3), rounds=2)
    rows = rows_of(results / "distillation-cpu.json")
    assert [(row["network"], row["masks"]) for row in rows] == [("small", 1), ("small", 3)]
    assert all(row["against as many passes"] > 0 and row["against a student's training step"] > 0 for row in rows)


def test_an_exact_setting_finds_all_and_chance_half(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "EPOCHS", {"digits": 3})
    monkeypatch.setattr(fidelity, "COMPARED", 2)
    rows = fidelity.compare("digits", "FC_1", "relu", None, ("start", "end"), 0)
    assert [row["moment"] for row in rows] == ["start", "end"]
    for row in rows:
        assert row["5x64"] > 0.9
        assert 0.6 < row["5x12"] < row["5x64"]
        assert row["5x12 /8"] < row["5x12"]


def test_cases_of_fidelity_are_compared_by_workers(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[object, ...]] = []

    def compare(*case: object) -> list[dict[str, Any]]:
        compared.append(case)
        return [{"network": case[1], "moment": "start", "5x12": 0.7}]

    monkeypatch.setattr(fidelity, "compare", compare)
    fidelity.main(networks=("FC_1", "CNN"), activations=("relu",), moments=("start",), seed=3)
    assert compared == [("digits", network, "relu", None, ("start",), 3) for network in ("FC_1", "CNN")]
    assert [row["network"] for row in rows_of(results / "fidelity-cpu.json")] == ["FC_1", "CNN"]


def test_all_networks_have_layers_to_drive() -> None:
    images = torch.randn(64, 1, 8, 8)
    for network in fidelity.NETWORKS:
        for activation in ACTIVATIONS.values():
            model = fidelity.build(network, activation, images)
            assert sum(isinstance(module, ConductanceDropout) for module in model.modules()) >= 2
            assert model(images).shape == (64, 10)


def test_the_trade_is_drawn_from_what_fidelity_found(results: Path, small: str, tmp_path: Path) -> None:
    found = {str(setting): 0.5 + number / 100 for number, setting in enumerate(fidelity.SETTINGS)}
    report.write_report("fidelity", torch.device("cpu"), {}, [{"moment": "start"} | found])
    trade.main(network=small, rounds=2, plot=tmp_path / "cost.png")
    rows = rows_of(results / "trade-cpu.json")
    assert {row["setting"]: row["share found"] for row in rows} == pytest.approx(found)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_growth_is_measured_along_each_axis_and_drawn_from_the_record(results: Path, tmp_path: Path) -> None:
    plot = tmp_path / "growth.png"
    growth.main(layers=(1, 2), widths=(8, 16), batches=(16, 32), samples=(1, 16), seconds_for_each=0.01, plot=plot)
    rows = {(row["axis"], row["value"]): row for row in rows_of(results / "growth-cpu.json")}
    assert [*rows] == [
        *(("layers", number) for number in (1, 2)),
        *(("width", number) for number in (8, 16)),
        *(("batch", number) for number in (16, 32)),
        *(("rows", number) for number in (5, 80)),
    ]
    # 6 and 81 rows forward, and backward as far as the first of two layers; training takes 64 rows.
    first, second, last = 784 * 1024, 1024 * 1024, 1024 * 10
    training = 64 * (2 * first + 3 * second + 3 * last)
    for value in (5, 80):
        phase1 = (value + 1) * (first + 2 * second + 2 * last)
        assert rows["rows", value]["floor"] == pytest.approx(1 + phase1 / training)
    assert all(row["ratio"] > 0 and row["rounds"] >= 4 for row in rows.values())
    assert rows["rows", 80]["ratio"] > rows["rows", 5]["ratio"]
    drawn = plot.stat().st_size
    plot.unlink()
    growth.main(plot=plot, redraw=True)
    assert plot.stat().st_size == drawn > 10_000


def test_layers_are_counted_in_both_placements(results: Path) -> None:
    layers.main(rounds=2, counts=(1, 2), depth=4, width=8)
    rows = rows_of(results / "layers-cpu.json")
    assert [(row["placement"], row["layers"]) for row in rows] == [
        ("last", 1),
        ("last", 2),
        ("spread", 1),
        ("spread", 2),
    ]
    assert min(row["bare ms"] for row in rows) > 0


def test_the_work_of_the_host_is_what_the_passes_do_not_do(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ydrop.importance.compiled.compiled_graph", lambda graph, tensors: graph)
    host.main(steps=24, depths=(1, 2))
    one, two = rows_of(results / "host-cpu.json")
    assert one["host work us, paper"] == one["hook us, paper"] - one["bare pass us"]
    # Two more operators forward and back for a linear layer, and as many for its activation.
    assert two["operators, bare"] > one["operators, bare"]
    assert two["operators"] > one["operators"] > one["operators, bare"]


def test_a_compiled_phase_1_is_timed_against_the_eager_one(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ydrop.importance.compiled.compiled_graph", lambda graph, tensors: graph)
    compiled.main(networks=["1x8", "2x16"], rounds=5)
    one, two = rows_of(results / "compiled-cpu.json")
    assert (one["network"], two["network"]) == ("1x8", "2x16")
    assert 0 < one["phase 1 ms, compiled"] < one["phase 1 ms, eager"]
    assert min(one["dropout ms"], one["dry run s, compiled"]) > 0


def test_memory_is_counted_in_every_stage_of_a_step(results: Path, small: str) -> None:
    memory.main(networks=[small])
    paper, recommended = rows_of(results / "memory-cpu.json")
    assert (paper["setting"], recommended["setting"]) == ("paper", "recommended")
    # Weights, their gradients and momentum, and the batch with its labels.
    parameters = 12 * 16 + 16 + 16 * 10 + 10
    assert paper["a step finds MiB"] * 2**20 == pytest.approx(4 * (3 * parameters + 64 * 12) + 8 * 64, rel=0.25)
    assert paper["Y-Drop MiB"] >= paper["phase 1 MiB"] > paper["a step finds MiB"]


@pytest.mark.parametrize("network", ["FC_1", "Transformer, checkpoints", "Transformer, checkpoints in training"])
def test_phase_1_takes_no_more_memory_than_training(network: str) -> None:
    case, device = memory.CASES[network], torch.device("cpu")
    plain, driven = memory.peaks_of(case, None, 32, device), memory.peaks_of(case, {}, 32, device)
    # Beside what our layers hold: a few numbers for each unit.
    assert driven["phase 1"] - driven["before"] < max(plain.values()) - plain["before"]


@pytest.mark.slow
def test_processes_exchange_their_scores(results: Path) -> None:
    ranks.main(rounds=3, processes=(2,), networks=("FC_1",))
    (row,) = rows_of(results / "ranks-cpu.json")
    assert row["bytes"] == 4 * 2 * (1024 + 1)  # of each layer the sums and how many samples there were
    assert row["processes"] == 2
    assert row["step ms"] > 0


def test_samplers_are_timed_with_finished_trials(results: Path) -> None:
    search.main(places=(2,), trials=(3, 9), samplers=("random", "table"), rounds=2)
    random, table = rows_of(results / "search-cpu.json")
    assert (random["sampler"], random["sample ms"]) == ("random", "")
    assert min(table["sample ms"], table["learn ms"], table["draw after 9 trials ms"]) > 0
    # Replay of 9 updates takes longer than that of 3.
    assert table["first draw after 9 trials s"] > table["learn ms"] / 1e3


def test_a_controller_finds_more_than_chance(results: Path) -> None:
    budget.main(trials=(150,), places=1, seeds=2, late=(0,), searchers=("random", "table"))
    random, table = rows_of(results / "budget-cpu.json")
    assert abs(random["last tenth"]) < 1
    assert table["last tenth"] > random["last tenth"] + 0.5
    assert 0 < table["entropy"] < 1.5
