"""A synthetic copy of the challenge's file layout: three small domains, one of them without flips.

dtd is unpacked, gtsrb a tar, aircraft a tar of wide images; every class has a hue of its own.
"""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from onetrunk.benchmark.decathlon import DOMAINS
from onetrunk.cli.app import main

N_CLASSES = 3
SIZES = {"train": 12, "val": 6, "test": 6}
SIDES = {"aircraft": (110, 72), "dtd": (72, 72), "gtsrb": (72, 72)}


def jpeg(label: int, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    width, height = size
    hue_3 = np.eye(3)[label] * 150 + 50
    pixels = np.clip(hue_3 + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_domain(root: Path, labels_folder: Path, name: str, *, tar: bool) -> None:
    """The files of one domain, with the official ids, keys and names."""
    first = DOMAINS[name].prefix * 10**7
    rng = np.random.default_rng(DOMAINS[name].prefix)
    categories = [
        {"id": first + 1 + c, "name": f"class {c}", "supercategory": name} for c in range(N_CLASSES)
    ]
    encoded: dict[str, bytes] = {}
    number = 0
    for part, n in SIZES.items():
        images, annotations = [], []
        for row in range(n):
            number += 1
            label = row % N_CLASSES
            image_id = first + {"train": 0, "val": 100_000, "test": 200_000}[part] + number
            below = part if part == "test" else f"{part}/{label + 1:04d}"
            file_name = f"data/{name}/{below}/{number:06d}.jpg"
            width, height = SIDES[name]
            images.append(
                {"id": image_id, "width": width, "height": height, "file_name": file_name}
            )
            annotations.append(
                {"id": image_id, "image_id": image_id, "category_id": first + 1 + label,
                 "segmentation": [], "area": 0, "bbox": [], "iscrowd": 0}
            )  # fmt: skip
            encoded[file_name] = jpeg(label, SIDES[name], rng)
        whole = {"info": {"year": 2017}, "images": images, "annotations": annotations,
                 "categories": categories, "licenses": []}  # fmt: skip
        if part == "test":
            (labels_folder / f"{name}_test.json").write_text(json.dumps(whole))
            whole, part = {"info": {}, "images": images, "licenses": []}, "test_stripped"
        (root / "annotations" / f"{name}_{part}.json").write_text(json.dumps(whole))
    if tar:
        write_tar(root / "data" / f"{name}.tar", encoded)
    else:
        for file_name, data in encoded.items():
            (root / file_name).parent.mkdir(parents=True, exist_ok=True)
            (root / file_name).write_bytes(data)


def write_tar(path: Path, encoded: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for file_name, data in encoded.items():
            member = tarfile.TarInfo(file_name.removeprefix("data/"))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def kit(tmp_path) -> Path:
    """The devkit's folder; the labels lie in `labels` beside it."""
    root, labels_folder = tmp_path / "decathlon-1.0", tmp_path / "labels"
    for folder in (root / "annotations", root / "data", labels_folder):
        folder.mkdir(parents=True)
    write_domain(root, labels_folder, "aircraft", tar=True)
    write_domain(root, labels_folder, "dtd", tar=False)
    write_domain(root, labels_folder, "gtsrb", tar=True)
    return root


@pytest.fixture
def labels(kit) -> Path:
    return kit.parent / "labels"


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Ran]:
    def call(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["onetrunk", "benchmark", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
        return Ran(status, *capsys.readouterr())

    return call
