"""Banks of every released format open forever, and their networks answer what they answered."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from onetrunk.bank.bank import Bank
from onetrunk.bank.card import FORMAT
from onetrunk.tensorfile import unpack

GOLDEN = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

FORMATS = sorted(folder.name for folder in GOLDEN.glob("format-*"))
BANKS = sorted(file.parts[-3:-1] for file in GOLDEN.glob("format-*/*/bank.json"))


def test_every_format_so_far_has_its_banks():
    assert [f"format-{i + 1}" for i in range(FORMAT)] == FORMATS


@pytest.mark.parametrize(("name", "label"), BANKS)
def test_a_golden_bank_answers_what_it_answered(tmp_path, name, label):
    expected, _ = unpack((GOLDEN / name / "expected.safetensors").read_bytes(), "expected")
    shutil.copytree(GOLDEN / name / label, tmp_path / "bank")  # verify makes a lock file
    bank = Bank.open(tmp_path / "bank", make.own() if label == "own" else None)
    wanted = {key.partition(".")[2] for key in expected if key.startswith(label)}
    assert set(bank.domains) == wanted
    for domain, card in bank.domains.items():
        assert card.classes == ("daisy", "rose", "tulip") and card.metrics == {"test_accuracy": 0.5}
        assert card.preprocessing.size_px == 16
        with torch.no_grad():
            y_bc = bank.load(domain)(expected["input"])
        torch.testing.assert_close(y_bc, expected[f"{label}.{domain}"], rtol=1e-6, atol=1e-6)
    found = bank.verify()
    assert found.ok and not found.remarks, found


def test_making_them_again_is_refused(monkeypatch):
    before = {file: file.read_bytes() for file in GOLDEN.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError):
        make.main()
    assert {file: file.read_bytes() for file in GOLDEN.rglob("*") if file.is_file()} == before


def test_they_stay_small():
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 1_500_000
