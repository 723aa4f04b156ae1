"""Networks for little data: what stands in them, and what they make of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from examples.data import ImageFolderData, MNISTDigits, Tabular, TextClassification, TimeSeries
from examples.networks import (
    AdamClassifier,
    Classifier,
    ClassifierBase,
    Dropout,
    ResNet18,
    SeriesFCN,
    TextCNN,
    TextLSTM,
    TextTransformer,
)
from examples.paper.experiment import CONFIGS, FILES
from lightning_ydrop import ConductanceDropout, Jumpout
from tests.examples.programs import EXAMPLES
from tests.examples.test_data import TEST, TRAIN, drawn, write_mnist
from tests.examples.test_files import write_pictures, write_table, write_text

SENTENCE, SERIES, PICTURE = (7, 20), (3, 16), (3, 32, 32)
NETWORKS: dict[str, Callable[..., ClassifierBase]] = {
    "TextCNN": lambda **given: TextCNN(SENTENCE, 4, channels=5, **given),
    "TextLSTM": lambda **given: TextLSTM(SENTENCE, 4, hidden=8, **given),
    "TextTransformer": lambda **given: TextTransformer(SENTENCE, 4, width=8, **given),
    "SeriesFCN": lambda **given: SeriesFCN(SERIES, 4, channels=[8, 16, 8], **given),
    "ResNet18": lambda **given: ResNet18(PICTURE, 4, channels=4, hidden=16, **given),
    "Classifier": lambda **given: Classifier((9,), 4, hidden=[8], **given),
}


def inputs_of(name: str, count: int = 3) -> torch.Tensor:
    if name.startswith("Text"):
        return torch.randint(1, SENTENCE[1], (count, SENTENCE[0]))
    shape = {"SeriesFCN": SERIES, "ResNet18": PICTURE, "Classifier": (9,)}[name]
    return torch.randn(count, *shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_dropout_stands_where_it_belongs(name: str) -> None:
    kinds: dict[Dropout, type[nn.Module]] = {
        "vanilla": nn.Dropout, "conductance": ConductanceDropout, "jumpout": Jumpout
    }  # fmt: skip
    counts = {}
    for dropout, kind in kinds.items():
        network = NETWORKS[name](dropout=dropout, p=0.3, jumpout={"sigma": 0.25})
        layers = [module for module in network.modules() if isinstance(module, (nn.Dropout, *kinds.values()))]
        # Attention has a dropout of its own, which is always off.
        layers = [layer for layer in layers if getattr(layer, "p", None) != 0.0]
        assert {type(layer) for layer in layers} == {kind}
        assert all(layer.sigma == 0.25 if dropout == "jumpout" else layer.p == 0.3 for layer in layers)
        counts[dropout] = len(layers)
        assert network(inputs_of(name)).shape == (3, 4)
    assert counts["vanilla"] == counts["conductance"] == (6 if name == "TextTransformer" else 1)
    assert counts["jumpout"] == (2 if name == "TextTransformer" else 1)
    plain = NETWORKS[name](dropout="none")
    x = inputs_of(name)
    assert torch.equal(plain.train()(x), plain(x))


@pytest.mark.parametrize("name", ["TextLSTM", "TextTransformer"])
def test_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    ids = inputs_of(name)
    ids[:, 4:] = 0
    with torch.no_grad():
        logits = network(ids)
        # What padding is embedded as is not read.
        network.get_parameter("words.weight")[0] = 5.0
        assert torch.allclose(network(ids), logits, atol=1e-6)
        assert network(torch.zeros_like(ids)).isfinite().all()


def test_the_lstm_reads_the_state_after_the_last_word() -> None:
    torch.manual_seed(0)
    network = TextLSTM(SENTENCE, 4, hidden=8).eval()
    ids = inputs_of("TextLSTM")
    for row, length in enumerate((7, 3, 1)):
        ids[row, length:] = 0
    for row, length in enumerate((7, 3, 1)):
        states, _ = network.lstm(network.words(ids[row : row + 1, :length]))
        assert torch.allclose(network.head(states[:, -1]), network(ids)[row : row + 1], atol=1e-6)


def test_adam_decays_weights_and_has_its_rate() -> None:
    optimizer: Any = TextCNN(SENTENCE, 4, lr=0.01, weight_decay=0.1).configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 0.01
    assert optimizer.defaults["weight_decay"] == 0.1
    assert issubclass(SeriesFCN, AdamClassifier)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    write_text(folder / "text.tsv", [(number % 3, "what is it that he said") for number in range(60)])
    write_table(folder / "table.csv", ["a", "b", "y"], [[number, number**2, number % 2] for number in range(60)])
    np.savez(folder / "series.npz", x=np.random.default_rng(0).normal(size=(60, 2, 30)), y=np.arange(60) % 3)
    write_pictures(folder / "pictures/train", 30, size=(32, 32))
    train, test = (drawn((1, 28, 28), count, 10, seed) for seed, count in enumerate((TRAIN, TEST)))
    write_mnist(folder / "mnist", train, test)
    roots = {"TextClassification": "text.tsv", "Tabular": "table.csv", "TimeSeries": "series.npz"}
    roots |= {"ImageFolderData": "pictures", "MNISTDigits": "mnist"}
    return {name: str(folder / file) for name, file in roots.items()}


TASKS = sorted(path for path in FILES.values() if path.parent.name == "tasks")


KINDS = sorted((CONFIGS / "kinds").glob("*.yaml"))
QUIET = ("--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.logger=false")


def root_for(row: Any, data: dict[str, str]) -> list[str]:
    """Say where the data of a task are."""
    kinds = [kind for kind in data if f"class_path: examples.data.{kind}\n" in row.read_text()]
    return [f"--data.root={data[kind]}" for kind in kinds]


@pytest.mark.parametrize("overlay", KINDS, ids=lambda path: path.stem)
def test_settings_for_each_kind_train_as_their_first_lines_say(
    overlay: Any, data: dict[str, str], cli: Callable[..., Any]
) -> None:
    line = overlay.read_text().partition("# Run: python -m examples.train ")[2]
    command = line.partition("\n# Measured")[0].replace("\\\n#", "").split()
    files = [Path(each) for each in command if each.endswith(".yaml")]
    assert files[-1].name == overlay.name
    assert command[-2:] == ["--data.root", "YOUR_DATA"] or "perceptrons" in overlay.stem
    root = [each for file in files for each in root_for(EXAMPLES.parent / file, data)]
    made = cli(["fit", *(f"--config={EXAMPLES.parent / file}" for file in files), *root, *QUIET])
    assert made.trainer.global_step == 1
    wanted = overlay.read_text()
    assert any(type(each).__name__ == "YDropCallback" for each in made.trainer.callbacks) == ("YDrop" in wanted)


@pytest.mark.parametrize("row", TASKS, ids=lambda path: path.stem)
def test_every_row_is_trained_on_files_of_its_kind(row: Any, data: dict[str, str], cli: Callable[..., Any]) -> None:
    (root,) = root_for(row, data)
    arguments = [f"--config={file}" for file in (CONFIGS / "base.yaml", row, CONFIGS / "ydrop.yaml")]
    if "Text" in row.read_text():
        arguments.append("--trainer.callbacks.init_args.interpolate_at=words")
    made = cli(
        [
            "fit",
            *arguments,
            root,
            *QUIET,
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert isinstance(made.datamodule, (TextClassification, Tabular, TimeSeries, ImageFolderData, MNISTDigits))
    assert made.trainer.global_step == 1
    callbacks: Any = made.trainer.callbacks
    callback = next(each for each in callbacks if type(each).__name__ == "YDropCallback")
    assert callback.engine.scores.keys() == callback.engine.layers.keys() != set()
