"""Commands as a user types them: argv in; exit status, output and error out."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from onetrunk.cli.app import main


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Ran]:
    def call(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["onetrunk", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
        return Ran(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of class folders: stripes one way or the other, 20 pictures each."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("across", "down"):
        (root / name).mkdir()
        for number in range(20):
            wave = 127 + 100 * np.sin(np.arange(40) / 2 + rng.uniform(0, 6))
            grey = np.tile(
                wave[:, None] if name == "across" else wave,
                (1, 40) if name == "across" else (40, 1),
            )
            pixels = np.clip(grey + rng.normal(0, 10, (40, 40)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos) -> Path:
    """A bank with one trained domain, `stripes`; tests must not change it."""
    path = tmp_path_factory.mktemp("banks") / "garden.bank"
    torch.manual_seed(0)
    argv, sys.argv = sys.argv, ["onetrunk", "new", str(path), "--backbone", "resnet26(width=0.25)"]
    try:
        main()
        sys.argv = [
            "onetrunk",
            "train",
            str(path),
            "stripes",
            "--data",
            str(photos),
            "--epochs",
            "3",
        ]
        main()
    finally:
        sys.argv = argv
    return path


@pytest.fixture
def bank(trained, tmp_path) -> Path:
    """A copy of the trained bank to change."""
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "garden.bank"))
