import random
from fnmatch import fnmatchcase

import pytest

from lightning_ydrop.layers.names import NamePatterns, fits_any, reported


def test_patterns_matched_at_once_are_matched_as_fnmatch_would_one_by_one() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        patterns = ["".join(chance.choices("ab.*?[]!", k=chance.randrange(4))) for _ in range(chance.randrange(5))]
        names = ["".join(chance.choices("ab.[", k=chance.randrange(4))) for _ in range(chance.randrange(4))]
        fitting = [i for i, each in enumerate(patterns) if any(fnmatchcase(name, each) for name in names)]
        assert NamePatterns(patterns).first(names) == (fitting[0] if fitting else None)
        assert NamePatterns(patterns).fit(names) is bool(fitting)
        for pattern in patterns:
            assert fits_any(pattern, dict.fromkeys(names)) is any(fnmatchcase(name, pattern) for name in names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ""),
        ("_orig_mod", ""),
        ("body._orig_mod.0", "body.0"),
        ("_orig_mod.0", "0"),
        ("my_orig_mod.0", "my_orig_mod.0"),
    ],
)
def test_names_are_reported_without_what_compilation_adds(name: str, expected: str) -> None:
    assert reported(name) == expected
