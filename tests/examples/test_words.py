import pytest

from examples.paper import words
from examples.paper.experiment import ARMS, ROWS
from lightning_ydrop.pictures import COLORS


def test_every_arm_has_a_name_and_a_color() -> None:
    assert sorted(words.ARMS) == ARMS
    assert all(words.arm_in_words(arm).lower() in COLORS for arm in ARMS)
    assert words.arm_in_words("ydrop n_steps=3") == "Y-Drop, n_steps=3"


def test_every_row_names_its_data() -> None:
    assert {row.partition("_")[0] for row in ROWS} == set(words.DATA)
    assert words.row_in_words("cifar10_s_1") == "CIFAR-10, S_1"
    assert words.row_in_words("digits") == "scikit-learn's digits"
    assert words.row_in_words("trec_cnn") == "TREC, CNN"
    assert words.row_in_words("tabular_vote") == "table, vote"
    assert words.row_in_words("pictures_resnet") == "pictures, ResNet-18"


@pytest.mark.parametrize(
    ("name", "value", "in_words"),
    [
        ("data.train_fraction", "0.01", "1%"),
        ("data.train_fraction", "1", "100%"),
        ("model.hidden", "[1024,1024,1024]", "3 x 1024"),
        ("model.hidden", "[64,32]", "[64,\n32]"),
        ("ydrop.elasticity", "1e-3", "1e-3"),
        ("ydrop.transition", "linear", "linear"),
        ("ydrop.measure", "experiments.measures.GradientTimesActivation", "Gradient\nTimes\nActivation"),
        ("data.root", "data/tabular/vote.csv", "data/tabular/vote.csv"),
    ],
)
def test_values_are_written_as_readers_know_them(name: str, value: str, in_words: str) -> None:
    assert words.value_in_words(name, value) == in_words


def test_an_argument_without_a_name_goes_by_its_own() -> None:
    assert words.argument_in_words("data.batch_size") == "batch size"
    assert words.argument_in_words("ydrop.num_samples") == "samples that units are scored on"
