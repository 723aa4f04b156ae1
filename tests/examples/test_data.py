"""The paper's data sets, written small in the format of each, read, and trained on as the real ones."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from torch import Tensor
from torchvision.datasets import cifar, stl10, svhn

from examples import data
from tests.examples.programs import EXAMPLES

ROWS = sorted(path for path in (EXAMPLES / "paper/rows").glob("*.yaml") if path.stem != "digits")
ARMS = sorted(path for path in (EXAMPLES / "configs").glob("*.yaml") if path.stem != "base")
TRAIN, TEST = 100, 20

Written = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def drawn(shape: tuple[int, ...], count: int, num_classes: int, seed: int) -> Written:
    """Draw images (N, C, H, W) as bytes, and labels."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *shape), dtype=np.uint8), random.integers(0, num_classes, count)


def write_mnist(root: Path, train: Written, test: Written) -> None:
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    for name, (images, labels) in (("train", train), ("t10k", test)):
        header = struct.pack(">iiii", 2051, len(images), 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 2049, len(labels)) + labels.astype(np.uint8).tobytes()
        )


def write_pickle(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))


def write_cifar10(root: Path, train: Written, test: Written) -> None:
    folder = root / "cifar-10-batches-py"
    for number in range(5):
        part = slice(number * TRAIN // 5, (number + 1) * TRAIN // 5)
        rows = train[0][part].reshape(-1, 3072)
        write_pickle(folder / f"data_batch_{number + 1}", {"data": rows, "labels": train[1][part].tolist()})
    write_pickle(folder / "test_batch", {"data": test[0].reshape(-1, 3072), "labels": test[1].tolist()})
    write_pickle(folder / "batches.meta", {"label_names": [str(label) for label in range(10)]})


def write_cifar100(root: Path, train: Written, test: Written) -> None:
    folder = root / "cifar-100-python"
    for name, (images, labels) in (("train", train), ("test", test)):
        write_pickle(folder / name, {"data": images.reshape(-1, 3072), "fine_labels": labels.tolist()})
    write_pickle(folder / "meta", {"fine_label_names": [str(label) for label in range(100)]})


def write_svhn(root: Path, train: Written, test: Written) -> None:
    root.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": tuple(values[: TRAIN // 2] for values in train),
        "extra": tuple(values[TRAIN // 2 :] for values in train),
        "test": test,
    }
    for name, (images, labels) in parts.items():
        # Pixels first, samples last, and the digit 0 as class 10.
        content = {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]}
        scipy.io.savemat(root / f"{name}_32x32.mat", content)


def write_stl10(root: Path, train: Written, test: Written) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, (images, labels) in (("train", train), ("test", test)):
        # Column by column, and classes from 1.
        (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{name}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))


WRITERS: dict[str, Callable[[Path, Written, Written], None]] = {
    "MNISTDigits": write_mnist,
    "CIFAR10Images": write_cifar10,
    "CIFAR100Images": write_cifar100,
    "SVHNImages": write_svhn,
    "STL10Images": write_stl10,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with all of them; that they are small is what torchvision is not to look at."""
    for module in (cifar, stl10, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda file, md5=None: Path(file).is_file())
    for name, write in WRITERS.items():
        kind = getattr(data, name)
        train, test = (drawn(kind.shape, count, kind.num_classes, count) for count in (TRAIN, TEST))
        write(tmp_path / name, train, test)
    return tmp_path


@pytest.mark.parametrize("name", WRITERS)
def test_images_and_labels_are_those_in_the_files(name: str, small: Path) -> None:
    module = getattr(data, name)(root=str(small / name))
    for train, count in ((True, TRAIN), (False, TEST)):
        images, labels = module.read(train, download=False)
        written, classes = drawn(module.shape, count, module.num_classes, count)
        assert torch.equal(images, torch.from_numpy(written))
        assert labels.tolist() == classes.tolist()
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("name", WRITERS)
def test_splits_are_the_papers_and_never_share_an_image(name: str, small: Path) -> None:
    module = getattr(data, name)(root=str(small / name), train_fraction=0.5, download=False)
    module.prepare_data()
    module.setup("fit")
    held_out = {"STL10Images": 10}.get(name, 25)
    assert len(module.val) == held_out
    assert len(module.train) == (TRAIN - held_out + 1) // 2
    assert len(module.test) == TEST
    assert module.batch_size == (32 if name in ("SVHNImages", "STL10Images") else 64)
    whole = getattr(data, name)(root=str(small / name))
    whole.setup("fit")
    assert torch.equal(whole.val.inputs, module.val.inputs)
    seen = {image.numpy().tobytes() for split in (whole.train, whole.val) for image in split.inputs}
    assert len(seen) == TRAIN


@pytest.mark.parametrize("name", WRITERS)
def test_training_images_are_flipped_and_cropped_where_the_paper_does(name: str, small: Path) -> None:
    module = getattr(data, name)(root=str(small / name))
    module.setup("fit")
    augmented = name in ("CIFAR10Images", "CIFAR100Images", "STL10Images")
    plain = [module.normalise(image) for image in module.train.inputs[:5]]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (module.mean, module.std))
    assert torch.allclose(plain[0] * std + mean, module.train.inputs[0] / 255, atol=1e-6)
    black = (0 - mean) / std

    def is_cut_from(image: Tensor, original: Tensor) -> bool:
        height, width = original.shape[1:]
        padded = black.expand(-1, height + 8, width + 8).clone()
        padded[:, 4:-4, 4:-4] = original
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (C, 9, 9, H, W)
        by_place = windows.permute(1, 2, 0, 3, 4)
        return any(bool(((by_place - each).abs().amax((2, 3, 4)) < 1e-6).any()) for each in (image, image.flip(2)))

    for place in range(5):
        reads = [module.train[place][0] for _ in range(4)]
        assert all(torch.equal(read, plain[place]) for read in reads) == (not augmented)
        assert all(is_cut_from(read, plain[place]) for read in reads)
    for split in (module.val, module.test):
        assert torch.equal(split[0][0], module.normalise(split.inputs[:1])[0])


def test_every_row_of_the_tables_has_its_file_and_every_arm() -> None:
    names = {path.stem for path in ROWS}
    assert names == {
        *(f"mnist_fc_{n}" for n in (1, 2, 3, 4)),
        *(f"cifar10_s_{n}" for n in (1, 2, 3, 4)),
        *(f"{name}_m_{n}" for name in ("stl10", "cifar100", "svhn") for n in (1, 2)),
        "mnist_fig_2",
        "mnist_s_1",
    }
    controls = {"dropout_at_mean_rate", "random", "shuffled", "inverted"}
    assert {path.stem for path in ARMS} == {"plain", "dropout", "jumpout", "ydrop", *controls}


# One of each data set in every run of the tests; the others differ in the widths of their layers.
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.stem, marks=() if row.stem.endswith("_1") else pytest.mark.slow) for row in ROWS],
)
def test_every_row_trains_from_its_files(row: Path, small: Path, cli: Callable[..., Any]) -> None:
    name = next(line.rpartition(".")[2] for line in row.read_text().splitlines() if "class_path" in line)
    arm = ARMS[ROWS.index(row) % len(ARMS)]
    arguments = [
        *("fit", f"--config={EXAMPLES / 'configs/base.yaml'}", f"--config={row}", f"--config={arm}"),
        *(f"--data.root={small / name}", "--data.num_workers=0", "--data.download=false", "--model.hidden=[16]"),
        *("--trainer.accelerator=cpu", f"--trainer.logger.save_dir={small / 'runs'}", "--trainer.log_every_n_steps=1"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    ]
    if "channels" in row.read_text():
        arguments.append("--model.channels=[4,4,4]")
    if "YDropCallback" in arm.read_text():
        arguments.append("--trainer.callbacks.annealing_epochs=1")
    cli([*arguments, "--trainer.fast_dev_run=true"])
    ended = cli([*arguments, "--trainer.max_epochs=2"])
    assert ended.trainer.current_epoch == 2
    # The paper's, which no other file of the configuration may change.
    assert ended.datamodule.batch_size == (32 if name in ("SVHNImages", "STL10Images") else 64)
    assert ended.datamodule.val_fraction == (0.1 if name == "STL10Images" else 0.25)
    assert 0 <= ended.reached["test_acc"] <= 1
