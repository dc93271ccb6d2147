"""The real domains, where they are: their counts are those that info.json promises."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from onetrunk.data import Prepared, Preprocessing, load

BESIDE = Path(__file__).parents[3] / "shared" / "data" / "mini-decathlon"
ROOT = Path(os.environ.get("ONETRUNK_DATA", BESIDE))

pytestmark = pytest.mark.skipif(
    not ROOT.is_dir(), reason=f"no data in {ROOT}; set ONETRUNK_DATA to the mini-decathlon"
)


@pytest.mark.parametrize("name", ["gtsrb", "omniglot", "meter_digits", "chest_xray", "emoji"])
def test_counts_and_classes(name: str) -> None:
    info = json.loads((ROOT / name / "info.json").read_text())
    splits = load(ROOT / name)
    assert (splits.name, splits.hflip) == (info["name"], info["flip_ok"])
    assert list(splits.classes) == info["classes"]
    for part, images in {"train": splits.train, "val": splits.val, "test": splits.test}.items():
        assert images is not None
        assert len(images) == info["sizes"][part]
        counts = torch.bincount(images.labels, minlength=info["num_classes"])
        assert counts.tolist() == info["per_class"][part]


@pytest.mark.parametrize("name", ["meter_digits", "omniglot"])
def test_every_image_decodes_and_has_the_promised_mean(name: str) -> None:
    info = json.loads((ROOT / name / "info.json").read_text())
    whole = Preprocessing(size_px=info.get("stored_px", 32), crop_ratio=1.0)
    prepared = Prepared(load(ROOT / name).train, whole)
    assert prepared.problems == ()
    x_nchw = prepared.batch(range(len(prepared)))[0].float() / 255
    assert x_nchw.mean((0, 2, 3)).tolist() == pytest.approx(info["mean"], abs=0.01)
