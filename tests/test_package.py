import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE_WITHOUT_CAPTUM = """
import sys

import torch
from torch import nn

import lightning_ydrop

model = nn.Sequential(nn.Linear(4, 8), lightning_ydrop.ConductanceDropout(), nn.Linear(8, 3))
lightning_ydrop.YDrop(model).step(torch.rand(16, 4), torch.zeros(16, dtype=torch.long))
assert "captum" not in sys.modules
lightning_ydrop.CaptumMeasure()
assert "captum" in sys.modules
"""


def test_captum_is_imported_on_first_use() -> None:
    subprocess.run([sys.executable, "-c", USE_WITHOUT_CAPTUM], check=True)


def test_all_public_names_are_there() -> None:
    import lightning_ydrop

    assert sorted(lightning_ydrop.__all__) == lightning_ydrop.__all__
    assert all(hasattr(lightning_ydrop, name) for name in lightning_ydrop.__all__)


def test_imports_flow_one_way() -> None:
    rooms = ["functional", "layers", "phase1", "callbacks"]  # each knows those before it alone
    for position, room in enumerate(rooms):
        for file in (ROOT / "lightning_ydrop" / room).glob("*.py"):
            text = file.read_text()
            above = [other for other in rooms[position + 1 :] if f"lightning_ydrop.{other}" in text]
            assert not above, f"{file} knows {above}"
            if room != "callbacks":
                assert "from lightning." not in text
                assert "import lightning\n" not in text


@pytest.mark.slow
def test_the_wheel_is_typed_and_holds_the_package_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lightning_ydrop/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_ydrop"}
