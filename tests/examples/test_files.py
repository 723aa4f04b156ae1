"""Data modules for a user's own files: what they read, learn, and refuse."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.data import ImageFolderData, InMemory, Samples, Tabular, TextClassification, TimeSeries


def write_table(file: Path, head: list[str], rows: Sequence[Sequence[object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([head, *rows])


def write_text(file: Path, lines: Sequence[tuple[object, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{label}\t{words}\n" for label, words in lines))


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (8, 8)) -> None:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for each in range(count):
            pixels = np.full((*size, 3), 100 * number + each, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{each}.png")


def batch_of(samples: Samples) -> tuple[Tensor, Tensor]:
    inputs, labels = zip(*samples.__getitems__(list(range(len(samples)))), strict=True)
    return torch.stack(inputs), torch.stack(labels)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [[number, number % 3, "red" if number % 2 else "blue", f"class {number % 2}"] for number in range(40)]
    write_table(tmp_path / "table.csv", ["size", "count", "color", "kind"], rows)
    return tmp_path / "table.csv"


def places(samples: Samples) -> set[float]:
    return set(samples.inputs[:, 0].tolist())


def test_the_test_set_stays_and_the_others_are_split_by_the_seed(table: Path) -> None:
    first, second = Tabular(str(table), split_seed=0), Tabular(str(table), split_seed=1)
    for data in (first, second):
        data.setup("fit")
        assert (len(data.train), len(data.val), len(data.test)) == (24, 8, 8)
        assert places(data.train) | places(data.val) | places(data.test) == set(range(40))
        assert data.test.labels.float().mean() == 0.5  # as many of each class
    assert places(first.test) == places(second.test)
    assert places(first.val) != places(second.val)
    less = Tabular(str(table), train_fraction=0.5)
    less.setup("fit")
    assert places(less.train) < places(first.train)
    assert len(less.train) == 12
    assert places(less.val) == places(first.val)


def test_a_folder_has_a_training_and_a_test_set(tmp_path: Path) -> None:
    write_table(tmp_path / "train.csv", ["x", "y"], [[number, number % 2] for number in range(8)])
    write_table(tmp_path / "test.csv", ["x", "y"], [[100, 1], [101, 0], [102, 0]])
    data = Tabular(str(tmp_path))
    data.setup("fit")
    assert places(data.test) == {100, 101, 102}
    assert data.test.labels.tolist() == [1, 0, 0]
    assert len(data.train) + len(data.val) == 8


def test_columns_of_numbers_are_scaled_by_what_is_trained_on_and_words_become_zeros_and_ones(table: Path) -> None:
    data = Tabular(str(table))
    assert data.shape == (4,)
    assert data.num_classes == 2
    data.setup("fit")
    x, y = batch_of(data.train)
    raw = data.train.inputs
    assert torch.allclose(x[:, :2].mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(x[:, :2].std(0, correction=0), torch.ones(2), atol=1e-6)
    assert torch.equal(x[:, 2:], raw[:, 2:])
    assert torch.equal(raw[:, 2], 1 - raw[:, 0] % 2)  # blue
    assert torch.equal(raw[:, 3], raw[:, 0] % 2)  # red
    assert torch.equal(y, (raw[:, 0] % 2).long())
    held, _ = batch_of(data.val)
    expected = (data.val.inputs[:, 0] - raw[:, 0].mean()) / raw[:, 0].std(correction=0)
    assert torch.allclose(held[:, 0], expected, atol=1e-6)


def test_what_is_missing_in_a_table_is_filled(tmp_path: Path) -> None:
    rows = [["" if number == 3 else number, "" if number % 2 else "a", number % 2] for number in range(20)]
    write_table(tmp_path / "train.csv", ["x", "word", "y"], rows)
    write_table(tmp_path / "test.csv", ["x", "word", "y"], [["", "never seen", 0], [1, "a", 1]])
    data = Tabular(str(tmp_path), train_fraction=1.0)
    data.setup("fit")
    x, _ = batch_of(data.test)
    known = data.train.inputs[:, 0]
    known = known[~known.isnan()]
    median = float(np.median(known))
    filled = torch.where(data.train.inputs[:, 0].isnan(), median, data.train.inputs[:, 0])
    assert x[0, 0] == pytest.approx(float((median - filled.mean()) / filled.std(correction=0)), abs=1e-5)
    assert x[:, 1:].tolist() == [[0, 0], [0, 1]]  # of "" and "a"
    assert all(batch_of(part)[0].isfinite().all() for part in (data.train, data.val))


def test_the_target_is_the_column_that_is_named_and_numbers_are_sorted_as_such(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ["grade", "x"], [[(2, 10, 9)[number % 3], number] for number in range(30)])
    data = Tabular(str(tmp_path / "t.csv"), target="grade")
    data.setup("fit")
    classes = torch.tensor([2, 10, 9])[data.train.inputs[:, 0].long() % 3]
    assert torch.equal(torch.tensor([2, 9, 10])[data.train.labels], classes)
    with pytest.raises(ValueError, match="no column 'missing', but grade, x"):
        Tabular(str(tmp_path / "t.csv"), target="missing").setup("fit")


SENTENCES = [(label, f"the {word} sat") for label, word in (("pos", "cat"), ("neg", "dog"))] * 10


def test_words_are_numbered_by_how_frequent_they_are_where_it_is_trained(tmp_path: Path) -> None:
    write_text(tmp_path / "train.tsv", [*SENTENCES, ("neg", "the dog 7 THE Dog 19 and and and")])
    write_text(tmp_path / "test.tsv", [("pos", "the dog flew 42"), ("neg", "")])
    data = TextClassification(str(tmp_path), length=6, vocabulary=3, val_fraction=0.1)
    assert data.shape == (6, 5)
    data.setup("fit")
    (x, y), (trained, _) = batch_of(data.test), batch_of(data.train)
    assert y.tolist() == [1, 0]
    assert trained.max() <= 4
    counts = torch.bincount(trained.flatten(), minlength=5)
    assert counts[2] >= counts[3] >= counts[4] > 0
    the, dog, flew, year = x[0, :4].tolist()
    assert the == 2  # the most frequent
    assert flew == year == 1
    assert dog in (1, 3, 4)
    assert x[0, 4:].tolist() == [0, 0]
    assert x[1].tolist() == [0] * 6


def test_all_numbers_of_as_many_digits_are_one_word(tmp_path: Path) -> None:
    write_text(
        tmp_path / "train.tsv", [(number % 2, f"In {1900 + number} OR in {number % 10}") for number in range(40)]
    )
    write_text(tmp_path / "test.tsv", [(0, "in 2026 or"), (1, "in 3 OR")])
    data = TextClassification(str(tmp_path), length=5)
    data.setup("fit")
    (words, _), (trained, _) = batch_of(data.test), batch_of(data.train)
    assert set(trained.flatten().tolist()) == {2, 3, 4, 5}
    assert words[0, 1] == trained[0, 1]
    assert words[1, 1] == trained[0, 4]
    assert torch.equal(words[:, [0, 2]], trained[:2, [0, 2]])


def test_words_that_are_not_trained_on_are_unknown(tmp_path: Path) -> None:
    lines: list[tuple[object, str]] = [(number % 2, f"word{chr(97 + number)}") for number in range(20)]
    write_text(tmp_path / "all.tsv", lines)
    data = TextClassification(str(tmp_path / "all.tsv"), length=2, val_fraction=0.25)
    data.setup("fit")
    assert sorted(batch_of(data.train)[0][:, 0].tolist()) == list(range(2, 2 + len(data.train)))
    assert batch_of(data.val)[0][:, 0].tolist() == [1] * len(data.val)
    assert batch_of(data.test)[0][:, 0].tolist() == [1] * len(data.test)


def test_pictures_are_scaled_and_those_that_are_trained_on_are_augmented(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 20)
    write_pictures(tmp_path / "test", 2, size=(16, 24))
    data = ImageFolderData(str(tmp_path), image_size=8)
    assert data.shape == (3, 8, 8)
    assert data.num_classes == 2
    data.setup("fit")
    assert data.test.inputs.shape == (4, 3, 8, 8)
    values = data.train.inputs.float() / 255
    (x, y), (held, _) = batch_of(data.val), batch_of(data.val)
    assert torch.equal(x, held)
    expected = (data.val.inputs / 255 - values.mean((0, 2, 3), keepdim=True)) / values.std((0, 2, 3), keepdim=True)
    assert torch.allclose(x, expected, atol=1e-5)
    assert torch.equal(y, (data.val.inputs[:, 0, 0, 0] >= 100).long())
    torch.manual_seed(0)
    shifted, _ = batch_of(data.train)
    assert not torch.equal(shifted, batch_of(data.train)[0])
    plain = ImageFolderData(str(tmp_path), image_size=8, augment_images=False)
    plain.setup("fit")
    assert torch.allclose(batch_of(plain.train)[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5)


def test_channels_of_series_are_scaled_and_what_is_missing_is_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(3, 2, (30, 2, 5))
    x[::3, :, 3:] = np.nan
    np.savez(tmp_path / "s.npz", x=x, y=np.array(["b", "a", "c"])[np.arange(30) % 3])
    data = TimeSeries(str(tmp_path / "s.npz"))
    assert data.shape == (2, 5)
    assert data.num_classes == 3
    data.setup("fit")
    series, labels = batch_of(data.train)
    raw = data.train.inputs
    is_there = ~raw.isnan()
    assert (series[~is_there] == 0).all()
    for channel in range(2):
        values = series[:, channel][is_there[:, channel]]
        assert values.mean() == pytest.approx(0.0, abs=1e-5)
        assert values.std(correction=0) == pytest.approx(1.0, abs=1e-5)
    short = raw.isnan().any(2).any(1)
    assert torch.equal(labels == 1, short)  # every third is "b", which is the second class


@pytest.mark.parametrize("kind", [ImageFolderData, Tabular, TextClassification, TimeSeries])
def test_what_is_not_there_is_said(kind: type[InMemory], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there: `root` is a folder with train"):
        kind(str(tmp_path / "nowhere")).setup("fit")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="has no train"):
        kind(str(tmp_path)).setup("fit")  # type: ignore[arg-type]


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "train.tsv", [("pos", "good"), ("neg", "bad")] * 4)
    write_text(tmp_path / "test.tsv", [("neutral", "so so")])
    with pytest.raises(ValueError, match=r"labels that its training set lacks: \['neutral'\]"):
        TextClassification(str(tmp_path)).setup("fit")
    (tmp_path / "bad.tsv").write_text("pos\tgood\nno tab here\n")
    with pytest.raises(ValueError, match="not `label TAB words`: 'no tab here'"):
        TextClassification(str(tmp_path / "bad.tsv")).setup("fit")
