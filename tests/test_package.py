import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE_WITHOUT_OTHERS = """
import sys

import torch
from torch import nn

import lightning_ydrop
import lightning_ydrop.search.controller
import lightning_ydrop.search.places
import lightning_ydrop.search.space

model = nn.Sequential(nn.Linear(4, 8), lightning_ydrop.ConductanceDropout(), nn.Linear(8, 3))
lightning_ydrop.YDrop(model).step(torch.rand(16, 4), torch.zeros(16, dtype=torch.long))
assert not {"captum", "optuna", "psycopg", "sqlalchemy"} & set(sys.modules)
lightning_ydrop.CaptumMeasure()
assert "captum" in sys.modules
"""


def test_what_takes_long_to_import_is_imported_on_first_use() -> None:
    subprocess.run([sys.executable, "-c", USE_WITHOUT_OTHERS], check=True)


def test_all_public_names_are_there() -> None:
    import lightning_ydrop

    assert sorted(lightning_ydrop.__all__) == lightning_ydrop.__all__
    assert all(hasattr(lightning_ydrop, name) for name in lightning_ydrop.__all__)


def imported(file: Path) -> set[str]:
    """Every module that a file imports, `from a import b` as both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


FLOORS = ["functional", "layers", "models", "importance", "uncertainty analysis search", "callbacks"]
# The program of the search trains with callbacks, so these files stand above all rooms.
PROGRAM = {"__main__", "apart", "cli", "export", "objective", "program", "progress", "studies", "training"}
BESIDE = {"errors", "checks", "pictures", "progress", "torch_internals"}  # which know no room


def test_imports_flow_one_way() -> None:
    for floor, names_of_rooms in enumerate(FLOORS):
        below = {room for rooms in FLOORS[:floor] for room in rooms.split()}
        for room in names_of_rooms.split():
            files = list((ROOT / "lightning_ydrop" / room).glob("*.py"))
            assert files, room
            for file in files:
                names = {name for name in imported(file) if name.startswith("lightning_ydrop.")}
                is_program = room == "search" and file.stem in PROGRAM
                above = {"callbacks"} if is_program else set()
                assert {name.split(".")[1] for name in names} <= {room, *below, *above, *BESIDE}, file
                assert is_program or not names & {f"lightning_ydrop.search.{each}" for each in PROGRAM}, file
    for name in BESIDE:
        names = imported(ROOT / "lightning_ydrop" / f"{name}.py")
        assert {each.split(".")[1] for each in names if each.startswith("lightning_ydrop.")} <= {"errors"}, name


def test_lightning_and_torchmetrics_are_imported_where_they_are_needed_alone() -> None:
    faces = {"callbacks", "uncertainty", "analysis", "search"}
    for file in (ROOT / "lightning_ydrop").rglob("*.py"):
        libraries = {name.split(".")[0] for name in imported(file)}
        assert file.parent.name in faces or not libraries & {"lightning", "pytorch_lightning", "torchmetrics"}, file


def test_what_a_search_needs_is_imported_in_search_alone() -> None:
    for file in (ROOT / "lightning_ydrop").rglob("*.py"):
        libraries = {name.split(".")[0] for name in imported(file)}
        assert file.parent.name == "search" or not libraries & {"optuna", "psycopg", "sqlalchemy"}, file


def test_no_file_of_importance_or_search_is_too_long_to_read_at_once() -> None:
    for file in (each for room in ("importance", "search") for each in (ROOT / "lightning_ydrop" / room).glob("*.py")):
        assert len(file.read_text().splitlines()) <= 350, file


@pytest.mark.slow
def test_the_wheel_is_typed_and_holds_the_package_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lightning_ydrop/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_ydrop"}
