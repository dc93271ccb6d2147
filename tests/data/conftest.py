"""Pictures and folders that the data tests share."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture() -> Image.Image:
    """An RGB picture of 48 x 32 pixels without any symmetry: smooth, so that JPEG keeps it."""
    y_hw, x_hw = np.mgrid[0:32, 0:48]
    x_hwc = np.stack([5 * x_hw, 7 * y_hw, 2 * x_hw + 3 * y_hw], axis=2)
    return Image.fromarray(np.clip(x_hwc, 0, 255).astype(np.uint8))


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """encode(image, "PNG", **options) -> the bytes of a file."""

    def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encoded


@pytest.fixture
def class_tree(tmp_path: Path, picture: Image.Image) -> Callable[..., Path]:
    """class_tree({"train/cat": 3, ...}) -> a folder with so many PNG files in each class folder."""

    def made(counts: dict[str, int], root: str = "pets") -> Path:
        for folder, n in counts.items():
            (tmp_path / root / folder).mkdir(parents=True)
            for index in range(n):
                picture.resize((12, 8)).save(tmp_path / root / folder / f"{index}.png")
        return tmp_path / root

    return made
