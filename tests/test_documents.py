"""The documents' code runs: every Python block of README and docs, every example."""

import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import onetrunk as ot
from onetrunk.data import Images

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.M | re.S)


def taken_for_granted() -> dict[str, object]:
    """The names that the documents take for granted."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    classes = ["daisy", "rose"]
    arrays = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    images = Images.from_arrays(arrays, [0, 1] * 4, classes)
    backbone = timm.create_model("resnet18")
    model = ot.attach(backbone, ot.Norm(), classes)
    return {
        "ot": ot,
        "torch": torch,
        "backbone": backbone,
        "classes": classes,
        "model": model,
        "better": model,
        "train_set": images,
        "val_set": images,
        "recipe": ot.Recipe(epochs=1, batch_size=4),
    }


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: d.name)
def test_the_code_in_a_document_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = taken_for_granted()
    for block in blocks(document):
        exec(compile(block, str(document), "exec"), names)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_an_example_runs_and_is_short(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(example.read_text().splitlines()) < 60
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_the_readme_shows_code_early_and_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 20
    assert len(lines) <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 45


def test_every_link_between_documents_leads_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", document.read_text()):
            assert os.path.exists(document.parent / target), f"{document.name}: {target}"
