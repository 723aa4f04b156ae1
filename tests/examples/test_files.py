"""Data modules for a user's own files: what they read, learn, and refuse."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.data import ImageFolderData, Samples, Tabular, TextClassification, TimeSeries


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
    with pytest.raises(ValueError, match=r"no column 'missing'. Choose `target` from grade, x\."):
        Tabular(str(tmp_path / "t.csv"), target="missing").setup("fit")


SENTENCES = [(label, f"the {word} sat") for label, word in (("pos", "cat"), ("neg", "dog"))] * 10


def test_words_are_numbered_by_how_frequent_they_are_where_it_is_trained(tmp_path: Path) -> None:
    write_text(tmp_path / "train.tsv", [*SENTENCES, ("neg", "the dog 7 THE Dog 19 and and and")])
    write_text(tmp_path / "test.tsv", [("pos", "the dog flew 42"), ("neg", "")])
    data = TextClassification(str(tmp_path), length=6, vocabulary=4, val_fraction=0.1)
    assert data.shape == (6, 6)
    data.setup("fit")
    (x, y), (trained, _) = batch_of(data.test), batch_of(data.train)
    assert y.tolist() == [1, 0]
    assert trained.max() == 5
    # What was read numbers each word by when it is met first.
    met = data.train.inputs.flatten().tolist()
    frequent = sorted((each for each in Counter(met).items() if each[0] != 0), key=lambda each: (-each[1], each[0]))
    numbers = {0: 0} | {word: number for number, (word, _) in enumerate(frequent[:4], start=2)}
    assert trained.flatten().tolist() == [numbers.get(word, 1) for word in met]
    the, dog, flew, year = x[0, :4].tolist()
    assert the == 2  # the most frequent
    assert dog == numbers[5]  # after "the", "cat" and "sat"
    assert flew == year == 1
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


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["pos", "neg"], ["neg", "pos"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["1.0", "1", "0.5"], ["0.5", "1", "1.0"]),
    ],
)
def test_labels_are_sorted_as_numbers_where_all_are(labels: list[str], classes: list[str], tmp_path: Path) -> None:
    write_text(tmp_path / "train.tsv", [(label, "some words") for label in labels] * 4)
    write_text(tmp_path / "test.tsv", [(label, "some words") for label in classes])
    data = TextClassification(str(tmp_path))
    assert data.num_classes == len(classes)
    data.setup("fit")
    assert data.test.labels.tolist() == list(range(len(classes)))


def test_lines_end_where_an_editor_ends_them_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = ["pos\tup\u0085and\u2028away", "neg\tdown\tand out", ""] * 8
    (tmp_path / "t.tsv").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    data = TextClassification(str(tmp_path / "t.tsv"), length=4)
    assert data.num_classes == 2
    data.setup("fit")
    assert [len(part) for part in (data.train, data.val, data.test)] == [9, 3, 4]
    assert (batch_of(data.test)[0] > 1).sum(1).tolist() == [3] * 4
    (tmp_path / "t.csv").write_bytes("\ufeffy,x\r\n".encode() + b'1,"2"\r\n0,3\r\n\r\n' * 8)
    table = Tabular(str(tmp_path / "t.csv"), target="y")
    assert table.shape == (1,)
    assert table.num_classes == 2


def test_sentences_without_words_are_padding(tmp_path: Path) -> None:
    write_text(tmp_path / "train.tsv", [("pos", ""), ("neg", " ")] * 4)
    write_text(tmp_path / "test.tsv", [("pos", "a word")])
    data = TextClassification(str(tmp_path), length=3)
    data.setup("fit")
    assert not batch_of(data.train)[0].any()
    assert batch_of(data.test)[0].tolist() == [[1, 1, 0]]


def test_a_table_of_words_alone_has_a_number_for_each(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ["a", "b", "y"], [["uv"[n % 2], "stu"[n % 3], n % 2] for n in range(30)])
    data = Tabular(str(tmp_path / "t.csv"))
    assert data.shape == (5,)
    data.setup("fit")
    x, y = batch_of(data.train)
    assert torch.equal(x[:, 1].long(), y)
    assert (x[:, :2].sum(1) == 1).all()
    assert (x[:, 2:].sum(1) == 1).all()


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
    plain = ImageFolderData(str(tmp_path), image_size=8, augment_images=False)
    plain.setup("fit")
    assert torch.allclose(batch_of(plain.train)[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5)


def test_a_picture_keeps_its_middle(tmp_path: Path) -> None:
    wide = np.full((16, 32), 40, dtype=np.uint8)
    wide[:, :8] = wide[:, 24:] = 255
    for pixels, folder in ((wide, "wide"), (wide.T, "high")):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(pixels).save(tmp_path / "train" / folder / f"{number}.png")
    data = ImageFolderData(str(tmp_path), image_size=8)
    data.setup("fit")
    assert data.train.inputs.shape[1:] == (3, 8, 8)  # a grey picture has three equal channels
    assert (data.train.inputs[:, :, 1:-1, 1:-1] == 40).all()
    assert data.num_classes == 2


def test_pictures_that_are_trained_on_are_shifted_by_an_eighth_and_flipped(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(1, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.png")
    data = ImageFolderData(str(tmp_path), image_size=8)
    data.setup("fit")
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        original = data.train.inputs[0]
        read = (data.train[0][0] * data.std[0] + data.mean[0]).mul(255).round().to(torch.uint8)
        padded = torch.nn.functional.pad(original, (1, 1, 1, 1))
        ways = {
            (top, left, flipped)
            for top in range(3)
            for left in range(3)
            for flipped in (False, True)
            for window in [padded[:, top : top + 8, left : left + 8]]
            if torch.equal(read, window.flip(2) if flipped else window)
        }
        assert len(ways) == 1
        seen |= ways
    assert {flipped for *_, flipped in seen} == {False, True}
    assert {shift for *shifts, _ in seen for shift in shifts} == {0, 1, 2}


def test_a_channel_that_is_the_same_everywhere_is_zero(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(10):
            red = np.zeros((8, 8, 3), dtype=np.uint8)
            red[..., 0] = 10 * number
            Image.fromarray(red).save(tmp_path / "train" / name / f"{number}.png")
    data = ImageFolderData(str(tmp_path), image_size=8, augment_images=False)
    data.setup("fit")
    x, _ = batch_of(data.train)
    assert x[:, 0].std() == pytest.approx(1.0, abs=1e-4)
    assert not x[:, 1:].any()


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
    for part in (data.val, data.test):
        held, _ = batch_of(part)
        values = raw.permute(1, 0, 2).flatten(1)
        mean, std = (torch.tensor(of(values.numpy(), axis=1))[:, None] for of in (np.nanmean, np.nanstd))
        expected = torch.where(part.inputs.isnan(), 0.0, (part.inputs - mean) / std)
        assert torch.allclose(held, expected, atol=1e-5)
    short = raw.isnan().any(2).any(1)
    assert torch.equal(labels == 1, short)  # every third is "b", which is the second class


def test_a_channel_of_a_series_that_is_missing_or_never_changes_is_zero(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3, 5))
    x[:, 1], x[:, 2] = np.nan, 7.0
    np.savez(tmp_path / "s.npz", x=x, y=np.arange(20) % 2)
    data = TimeSeries(str(tmp_path / "s.npz"))
    data.setup("fit")
    series, _ = batch_of(data.train)
    assert series[:, 0].all()
    assert not series[:, 1:].any()


LAYOUTS = {
    ImageFolderData: "`root` is a folder with train and, optionally, test.",
    Tabular: "`root` is a folder with train.csv and, optionally, test.csv, or one .csv file.",
    TextClassification: "`root` is a folder with train.tsv and, optionally, test.tsv, or one .tsv file.",
    TimeSeries: "`root` is a folder with train.npz and, optionally, test.npz, or one .npz file.",
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_is_not_there_is_said(kind: type[ImageFolderData], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        kind(str(tmp_path / "nowhere")).setup("fit")
    assert str(caught.value) == f"{tmp_path}/nowhere does not exist. {LAYOUTS[kind]}"
    with pytest.raises(FileNotFoundError) as caught:
        kind(str(tmp_path)).setup("fit")
    file = LAYOUTS[kind].split()[5]
    assert str(caught.value) == f"{tmp_path} has no {file}. {LAYOUTS[kind]}"


def test_a_file_is_no_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "cat.png").touch()
    with pytest.raises(NotADirectoryError, match=re.escape(f"cat.png is a file. {LAYOUTS[ImageFolderData]}")):
        ImageFolderData(str(tmp_path / "cat.png")).setup("fit")


def test_a_label_that_is_never_trained_on_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "train.tsv", [("pos", "good"), ("neg", "bad")] * 4)
    write_text(tmp_path / "test.tsv", [("neutral", "so so"), ("pos", "good"), ("both", "hm")])
    with pytest.raises(ValueError, match="labels") as caught:
        TextClassification(str(tmp_path)).setup("fit")
    assert str(caught.value) == (
        f"The test set of {tmp_path} has labels that its training set lacks: ['both', 'neutral']. "
        "Add samples of them to the training set, or remove them from the test set."
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["pos\tgood", "no tab here"],
            "has the line 'no tab here'. Each line is `label TAB words`: put a tab after the label.",
        ),
        (["pos\tgood", "\tbad", "\tso so"] * 8, "has samples without a label. Remove them, or label them."),
        (["pos\tgood", "neg\tbad"], "has no test set, and too few samples to split one off: "),
        (["pos\tgood", "neg\tbad"], " Add samples, or write test.tsv."),
    ],
)
def test_sentences_that_cannot_be_read_are_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(message)):
        TextClassification(str(tmp_path / "t.tsv")).setup("fit")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("", "", "train.csv has no rows. Write the names of the columns, and then a row for each sample."),
        ("1,a,0\n2,1\n", "", "train.csv has 3 columns, but the row '2,1' has 2 cells. Leave a cell empty if "),
        ("1,a,0\n2,b,\n" * 4, "x,word,y\n1,a,0\n", "has samples without a label. Remove them, or label them."),
        (
            "1,a,0\n2,b,1\n" * 4,
            "word,x,y\na,1,0\n",
            "test.csv has the columns word, x, y, but the training set has x, word, y. "
            "Write the same columns in the same order.",
        ),
        (
            "1,a,0\n2,b,1\n" * 4,
            "x,word,y\n?,a,0\n",
            "test.csv has '?' in a column that has only numbers in the training set. "
            "Write a number, or leave the cell empty.",
        ),
    ],
)
def test_tables_that_cannot_be_read_are_refused(train: str, test: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(f"x,word,y\n{train}")
    (tmp_path / "test.csv").write_text(test)
    with pytest.raises(ValueError, match=re.escape(message)):
        Tabular(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("arrays", "shapes"),
    [
        ({"x": np.zeros((20, 5)), "y": np.zeros(20)}, "{'x': (20, 5), 'y': (20,)}"),
        ({"x": np.zeros((20, 1, 5)), "y": np.zeros(19)}, "{'x': (20, 1, 5), 'y': (19,)}"),
        ({"x": np.zeros((20, 1, 5))}, "{'x': (20, 1, 5)}"),
    ],
)
def test_series_that_cannot_be_read_are_refused(arrays: dict[str, Any], shapes: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match="Save x as") as caught:
        TimeSeries(str(tmp_path / "s.npz")).setup("fit")
    assert str(caught.value) == (f"{tmp_path}/s.npz has arrays of shapes {shapes}. Save x as (N, C, T), and y as (N,).")


def test_series_with_a_label_that_is_no_number_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.zeros((20, 1, 5)), y=np.array([0.0, np.nan] * 10))
    with pytest.raises(ValueError, match="has samples without a label"):
        TimeSeries(str(tmp_path / "s.npz")).setup("fit")
