"""The example of deployment: what onnxruntime returns is what torch returns, and bad input is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from examples import deploy
from examples.data import Digits
from lightning_ydrop import ConfigurationError, monte_carlo

pytestmark = pytest.mark.filterwarnings(  # the exporter's
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
Exported = dict[str, tuple[nn.Module, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A teacher, a student and a student with a head, each with its file."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    data = Digits(train_fraction=0.1)
    teacher = deploy.trained_teacher(data, max_epochs=1)
    networks: dict[str, nn.Module] = {
        "teacher": teacher,
        "student": deploy.distilled(teacher, data, max_epochs=1, uncertainty_head=False),
        "head": deploy.distilled(teacher, data, max_epochs=1),
    }
    for name, network in networks.items():
        outputs = deploy.OUTPUTS if name == "head" else deploy.OUTPUTS[:1]
        deploy.export(network, torch.randn(2, 1, 8, 8), folder / name, outputs)
    return {name: (network, folder / name) for name, network in networks.items()}


@pytest.mark.parametrize("name", ["teacher", "student", "head"])
def test_onnxruntime_returns_what_torch_returns(name: str, exported: Exported) -> None:
    network, file = exported[name]
    served = deploy.Served(file, threads=1)
    for batch in (1, 2, 7, 360):
        x = 3 * torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected: Any = network(x)
        found = served(x.numpy())
        assert list(found) == (["logits", "aleatoric", "epistemic"] if name == "head" else ["logits"])
        for one, other in zip(found.values(), expected if name == "head" else [expected], strict=True):
            assert one.dtype == np.float32
            assert torch.allclose(torch.from_numpy(one), other, atol=1e-5)


def test_what_is_exported_drops_nothing(exported: Exported) -> None:
    for _, file in exported.values():
        assert not [node for node in onnx.load(file).graph.node if re.search("Dropout|Random|Bernoulli", node.op_type)]


def test_a_model_in_training_mode_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"export\(Sequential.*training mode.*Call model.eval\(\)"):
        deploy.export(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("inputs", "given"),
    [
        (np.zeros((2, 1, 8, 8)), r"float64 \(2, 1, 8, 8\)"),
        (np.zeros((2, 64), np.float32), r"float32 \(2, 64\)"),
        (np.zeros((2, 1, 8, 9), np.float32), r"float32 \(2, 1, 8, 9\)"),
        (torch.zeros(2, 1, 8, 8), r"Tensor"),
    ],
    ids=["float64", "flat", "wide", "torch"],
)
def test_batches_that_are_none_of_the_models_are_refused(inputs: Any, given: str, exported: Exported) -> None:
    with pytest.raises(ConfigurationError, match=rf"{given}.*float32 of the shape.*'batch', 1, 8, 8"):
        deploy.Served(exported["head"][1])(inputs)


def test_students_and_averages_say_the_same_things(exported: Exported) -> None:
    x = torch.randn(5, 1, 8, 8)
    probabilities, parts = deploy.uncertainties(deploy.Served(exported["head"][1])(x.numpy()))
    assert torch.allclose(parts["total"], parts["aleatoric"] + parts["epistemic"], atol=1e-5)
    assert torch.allclose(probabilities.sum(1), torch.ones(5))
    teacher = exported["teacher"][0]
    torch.manual_seed(0)
    average, of_average = deploy.averaged(teacher, x, 7)
    torch.manual_seed(0)
    expected = monte_carlo(teacher, x, 7)
    assert torch.equal(average, expected.probabilities)
    assert of_average.keys() == parts.keys()
    assert torch.equal(of_average["total"], expected.entropy)
    assert torch.equal(of_average["aleatoric"], expected.expected_entropy)
    assert torch.equal(of_average["epistemic"], expected.mutual_information)


def test_the_table_tells_right_predictions_from_wrong_ones() -> None:
    probabilities = torch.tensor([[0.9, 0.1, *[0.0] * 8], [0.5, 0.5 - 1e-3, 1e-3, *[0.0] * 7]])
    parts = {"total": torch.tensor([0.1, 0.2]), "epistemic": torch.tensor([0.2, 0.1])}
    said = deploy.table({"some model": (probabilities, parts)}, torch.tensor([0, 1]))
    assert re.search(r"some model +50.00 .* 1\.000 +0\.000$", said)


def test_the_program_writes_the_file_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy.main(["--max-epochs", "1", "--out", str(tmp_path / "student.onnx")])
    said = capsys.readouterr().out
    found = re.search(r"student\.onnx: onnxruntime differs from torch by (\S+) at most", said)
    assert found is not None
    assert float(found.group(1)) < 1e-5
    rows = re.findall(r"^ *(\w+, .+?)  +[\d.]+  +[\d.]+  +[\d.]+   ([\d. ]+)$", said, re.MULTILINE)
    assert {name: len(aurocs.split()) for name, aurocs in rows} == {
        "teacher, one pass": 1,
        "teacher, 10 masks": 3,
        "teacher, 100 masks": 3,
        "student, onnxruntime": 3,
    }
    assert deploy.Served(tmp_path / "student.onnx")(np.zeros((3, 1, 8, 8), np.float32))["logits"].shape == (3, 10)


def test_a_file_in_no_folder_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deploy, "trained_teacher", None)
    with pytest.raises(SystemExit):
        deploy.main(["--out", str(tmp_path / "missing" / "student.onnx")])
    assert "there is no folder" in capsys.readouterr().err
