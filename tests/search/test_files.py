from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from lightning_ydrop import ConfigurationError, ConvPattern, TokenPattern
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.files import as_patterns, read_patterns, write_patterns

PATTERNS: dict[str, Pattern] = {
    "stage1.1": ConvPattern(0.25, 1 / 16, 2, 22.5, -0.3, 0.3, True, True, 0.5),
    "stage1.2": ConvPattern(0),
    "queries": TokenPattern("all", share_t=True, rate=0.2),
    "keys": TokenPattern(4, 8, share_c=True),
}


def test_patterns_round_trip_in_order(tmp_path: Path) -> None:
    write_patterns(PATTERNS, tmp_path / "patterns.yaml")
    for path in (tmp_path / "patterns.yaml", str(tmp_path / "patterns.yaml")):
        assert read_patterns(path) == PATTERNS
        assert list(read_patterns(path)) == list(PATTERNS)


def test_the_file_is_in_the_form_of_lightning_cli(tmp_path: Path) -> None:
    repeat: Any = numpy.int64(2)
    write_patterns({"stage1.1": ConvPattern(numpy.float64(0.25), repeat=repeat)}, tmp_path / "patterns.yaml")
    written = yaml.safe_load((tmp_path / "patterns.yaml").read_text())
    assert written["stage1.1"]["class_path"] == "lightning_ydrop.ConvPattern"
    assert written["stage1.1"]["init_args"]["size"] == 0.25
    assert written["stage1.1"]["init_args"]["repeat"] == 2
    assert (tmp_path / "patterns.yaml").read_text().startswith("stage1.1:\n  class_path: lightning_ydrop.ConvPattern\n")


def test_arguments_with_defaults_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "patterns.yaml"
    path.write_text("stage1.1: {class_path: lightning_ydrop.ConvPattern, init_args: {size: 0.25}}")
    assert read_patterns(path) == {"stage1.1": ConvPattern(0.25)}
    path.write_text("stage1.1: {class_path: lightning_ydrop.layers.patterns.TokenPattern, init_args: {size: all}}")
    assert read_patterns(path) == {"stage1.1": TokenPattern("all")}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "Patterns are a mapping"),
        ("", "Patterns are a mapping"),
        ("1: {}", "Patterns are a mapping"),
        ("stage1.1: [", "is no YAML"),
        ("stage1.1: 3", "found stage1.1: 3."),
        ("stage1.1: {class_path: os.system, init_args: {size: 1}}", "lightning_ydrop.ConvPattern or"),
        ("stage1.1: {class_path: lightning_ydrop.ConvPattern, init_args: 3}", "and init_args"),
        ("stage1.1: {class_path: lightning_ydrop.ConvPattern, size: 3}", "and init_args"),
        ("stage1.1: {class_path: lightning_ydrop.ConvPattern}", "stage1.1 without 'size'"),
        (
            "stage1.1: {class_path: lightning_ydrop.ConvPattern, init_args: {size: 0.1, sise: 1}}",
            "stage1.1 with the argument 'sise'",
        ),
        (
            "stage1.1: {class_path: lightning_ydrop.ConvPattern, init_args: {size: 3}}",
            "found stage1.1: ConvPattern(size=3) was given.",
        ),
    ],
)
def test_bad_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "patterns.yaml").write_text(content)
    with pytest.raises(ConfigurationError, match="read_patterns") as caught:
        read_patterns(tmp_path / "patterns.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize("path", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_named_in_full(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_patterns(path)
    assert f"read_patterns('{path}') was given" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_pattern_is_not_written(tmp_path: Path) -> None:
    patterns: Any = {"stage1.1": 0.25}
    with pytest.raises(ConfigurationError, match="write_patterns"):
        write_patterns(patterns, tmp_path / "patterns.yaml")
    assert not (tmp_path / "patterns.yaml").exists()


def test_mappings_of_any_library_are_read() -> None:
    class Namespace:
        def __init__(self, **kwargs: Any) -> None:
            self.__dict__.update(kwargs)

    given = Namespace(class_path="lightning_ydrop.TokenPattern", init_args=Namespace(size=2))
    assert as_patterns("f", {"queries": given}) == {"queries": TokenPattern(2)}
