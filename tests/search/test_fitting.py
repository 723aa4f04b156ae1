import pytest

from lightning_ydrop import ConfigurationError, ConvPattern, TokenPattern, apply_patterns, find_places
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.fitting import fit_patterns
from lightning_ydrop.search.places import Place, PlaceReport
from tests.search.networks import bert, wide


def report_of(*counts: int) -> PlaceReport:
    names = [f"stage{stage}.{order}" for stage, count in enumerate(counts, 1) for order in range(1, count + 1)]
    return PlaceReport({name: Place(name, "conv", (name,), (), "") for name in names}, {})


def patterns_of(*counts: int) -> dict[str, Pattern]:
    return dict.fromkeys(report_of(*counts).places, ConvPattern(0.25))


def test_the_same_depth_takes_patterns_as_they_are() -> None:
    patterns = patterns_of(2, 3)
    assert fit_patterns("apply_patterns", report_of(2, 3), patterns) == {name: name for name in patterns}


@pytest.mark.parametrize("there", [1, 2, 3, 4, 6, 7, 12])
@pytest.mark.parametrize("given", [1, 2, 3, 4, 5])
def test_another_depth_takes_them_by_relative_depth_stage_by_stage(there: int, given: int) -> None:
    fitted = fit_patterns("apply_patterns", report_of(there, 2), patterns_of(given, 2))
    expected = {f"stage1.{i + 1}": f"stage1.{i * given // there + 1}" for i in range(there)}
    assert fitted == expected | {"stage2.1": "stage2.1", "stage2.2": "stage2.2"}


def test_names_with_gaps_are_taken_as_they_are() -> None:
    assert fit_patterns("f", report_of(2, 2), {"stage2.1": ConvPattern(0.25)}) == {"stage2.1": "stage2.1"}
    assert fit_patterns("f", report_of(2, 2), {"stage1.2": ConvPattern(0.25)}) == {"stage1.2": "stage1.2"}


@pytest.mark.parametrize("given", [(1, 1), (2,)])
def test_names_of_fewer_stages_are_those_of_places(given: tuple[int, ...]) -> None:
    patterns = patterns_of(*given)
    assert fit_patterns("apply_patterns", report_of(2, 1, 1), patterns) == {name: name for name in patterns}


@pytest.mark.parametrize("given", [(2, 2), (2, 2, 2, 2)])
def test_another_number_of_stages_is_refused(given: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        fit_patterns("apply_patterns", report_of(2, 1, 1), patterns_of(*given))
    assert str(caught.value) == (
        f"apply_patterns was given patterns of {len(given)} stage(s): {', '.join(patterns_of(*given))}. "
        "The model has 3 stage(s). The places of the model are stage1.1, stage1.2, stage2.1, stage3.1. "
        "Name a pattern for each stage; ConvPattern(size=0) leaves a place as it is."
    )


def test_the_report_says_what_was_fitted_how() -> None:
    sizes = {"stage1.1": 0.25, "stage2.1": 0.375, "stage3.1": 0.5}
    patterns = {name: ConvPattern(size) for name, size in sizes.items()}
    as_they_are = apply_patterns(wide(10, 2), patterns)
    assert as_they_are.fitted == {}
    assert as_they_are.applied == patterns
    deeper = apply_patterns(wide(16, 1), patterns)
    assert deeper.fitted == {f"stage{stage}.{order}": f"stage{stage}.1" for stage in (1, 2, 3) for order in (1, 2)}
    assert deeper.applied["stage2.2"] == patterns["stage2.1"]
    assert "6 pattern(s) applied, 6 of them by relative depth" in str(deeper)
    assert "  stage2.2: ConvPattern(size=0.375" in str(deeper)
    assert ", the pattern of stage2.1" in str(deeper)


def test_blocks_of_transformers_fit_by_relative_depth_too() -> None:
    names = list(find_places(bert(2), per_block=True).places)
    patterns: dict[str, Pattern] = {name: TokenPattern(2 if "block1" in name else 4) for name in names}
    report = apply_patterns(bert(4), patterns)
    sizes = [report.applied[f"block{number}.queries"].size for number in (1, 2, 3, 4)]
    assert sizes == [2, 2, 4, 4]
    assert report.fitted["block4.keys"] == "block2.keys"
    shallower = apply_patterns(bert(1), patterns)
    assert shallower.applied["block1.queries"].size == 2
    with pytest.raises(ConfigurationError, match=r"block1\.attention"):
        apply_patterns(bert(1), {"block1.attention": TokenPattern(2), "block2.attention": TokenPattern(2)})


def test_one_set_for_all_blocks_fits_any_depth() -> None:
    report = apply_patterns(bert(3), {"queries": TokenPattern(2)})
    assert report.fitted == {}
    assert list(report.applied) == ["queries"]
