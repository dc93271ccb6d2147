"""Preprocessing: what it refuses and writes, and that its views depend on nothing but seeds."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional

from onetrunk.data import Preprocessing, view_seeds
from onetrunk.data.preprocessing import _boxes, _uniforms
from onetrunk.errors import DataError

SMALL = Preprocessing(size_px=24, crop_ratio=0.75, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))


def prepared(preprocessing: Preprocessing, n: int, seed: int = 0) -> torch.Tensor:
    side = preprocessing.prepared_px
    shape = (n, preprocessing.channels, side, side)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def naive_normal(view_chw: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    channels = [
        (view_chw[c].double() / 255 - preprocessing.mean[c]) / preprocessing.std[c]
        for c in range(preprocessing.channels)
    ]
    return torch.stack(channels)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        SMALL,
        Preprocessing(size_px=1, crop_ratio=1.0, hflip=False),
        Preprocessing(crop="squash", interpolation="nearest", mean=(0,), std=(1,), channels=1),
    ],
)
def test_json_round_trip(preprocessing: Preprocessing) -> None:
    written = json.loads(json.dumps(preprocessing.to_json()))
    assert Preprocessing.from_json(written) == preprocessing
    assert hash(Preprocessing.from_json(written)) == hash(preprocessing)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("size_px", 0, "size_px=0 was asked for; expected an integer from 1 to 4096"),
        ("size_px", 5000, "expected an integer from 1 to 4096"),
        ("size_px", 64.0, "expected an integer"),
        ("size_px", True, "expected an integer"),
        ("size_px", "64", "size_px='64'"),
        ("crop", "border", "crop='border' was asked for; expected 'center' or 'squash'"),
        ("crop_ratio", 0, "crop_ratio=0 was asked for; expected a number from 0.1 to 1"),
        ("crop_ratio", 1.1, "expected a number from 0.1 to 1"),
        ("crop_ratio", math.nan, "crop_ratio=nan"),
        ("interpolation", "lanczos", "expected 'bilinear' or 'bicubic' or 'nearest'"),
        ("mean", [0.5], "expected 3 numbers, one a channel"),
        ("mean", 0.5, "expected 3 numbers, one a channel"),
        ("mean", [0.5, 0.5, "x"], "mean='x'"),
        ("mean", [0.5, 0.5, math.inf], "mean=inf"),
        ("std", [0.5, 0.5, 0.0], "std=0.0 was asked for; expected a number from 1e-06"),
        ("hflip", 1, "hflip=1 was asked for; expected true or false"),
        ("channels", 4, "channels=4 was asked for; expected 1 or 3"),
        ("channels", True, "channels=True"),
        ("channels", None, "channels=None"),
        ("crop", ["center"], "crop="),
    ],
)
def test_wrong_values_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(DataError, match="preprocessing") as refusal:
        Preprocessing.from_json({**Preprocessing().to_json(), name: value})
    assert message in str(refusal.value)


def test_unknown_and_missing_keys_are_refused() -> None:
    values = {**Preprocessing().to_json(), "rotate": 3}
    del values["mean"]
    with pytest.raises(DataError, match=r"unknown keys \['rotate'\] and lacks \['mean'\]"):
        Preprocessing.from_json(values)
    with pytest.raises(DataError, match="must be a JSON object"):
        Preprocessing.from_json([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (1, 1), (500, 3), (3, 500), (32, 32)])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_prepare_has_the_promised_shape(size: tuple[int, int], crop: str) -> None:
    preprocessing = Preprocessing.from_json({**SMALL.to_json(), "crop": crop})
    x_chw = preprocessing.prepare(Image.new("RGB", size, (10, 20, 30)))
    assert x_chw.shape == (3, 32, 32)
    assert x_chw.dtype == torch.uint8
    assert torch.equal(x_chw.float().mean((1, 2)), torch.tensor([10.0, 20.0, 30.0]))


def test_center_cuts_and_squash_does_not() -> None:
    bands = Image.new("L", (96, 32), 0)
    bands.paste(255, (32, 0, 64, 32))  # black, white, black
    grey = {**SMALL.to_json(), "mean": [0], "std": [1], "channels": 1}
    cut = Preprocessing.from_json(grey).prepare(bands)
    squashed = Preprocessing.from_json({**grey, "crop": "squash"}).prepare(bands)
    assert cut.min() == 255
    assert squashed[0, 16, 0] == 0 and squashed[0, 16, 16] == 255 and squashed[0, 16, -1] == 0


def test_prepare_is_antialiased_and_deterministic(picture: Image.Image) -> None:
    y_hw, x_hw = np.mgrid[0:512, 0:512]
    checks = Image.fromarray(((x_hw + y_hw) % 2 * 255).astype(np.uint8))
    x_chw = SMALL.prepare(checks).int()
    assert (x_chw - 128).abs().max() <= 3  # a fine chequer board is grey from afar
    assert torch.equal(SMALL.prepare(picture), SMALL.prepare(picture))


def test_channels_are_converted(picture: Image.Image) -> None:
    grey = Preprocessing(size_px=24, mean=(0.5,), std=(0.5,), channels=1)
    assert grey.prepare(picture).shape == (1, 27, 27)
    x_chw = SMALL.prepare(picture.convert("L"))
    assert torch.equal(x_chw[0], x_chw[1]) and torch.equal(x_chw[0], x_chw[2])


def test_evaluation_view_is_the_normalised_centre() -> None:
    x_bchw = prepared(SMALL, 3)
    view_bchw = SMALL.evaluation_view(x_bchw)
    assert view_bchw.shape == (3, 3, 24, 24)
    assert view_bchw.dtype == torch.float32
    for x_chw, view_chw in zip(x_bchw, view_bchw, strict=True):
        expected = naive_normal(x_chw[:, 4:28, 4:28], SMALL)
        torch.testing.assert_close(view_chw.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_resized_crop_is_torchvisions(channels: int) -> None:
    """Within one grey level: older processors round elsewhere."""
    plain = Preprocessing(
        size_px=24, channels=channels, mean=(0.0,) * channels, std=(1 / 255,) * channels
    )  # fmt: skip
    side = plain.prepared_px
    x_bchw = torch.randint(0, 256, (32, channels, side, side), dtype=torch.uint8)
    seeds, scale = view_seeds(0, 1, range(32)), (0.4, 1.0)
    draws = _uniforms(seeds, 32)
    boxes, flipped = _boxes(draws, side, scale), plain._flipped(draws)
    for view, x_chw, box, flip in zip(
        plain.training_view(x_bchw, seeds, scale=scale), x_bchw, boxes, flipped, strict=True
    ):
        crop = functional.resized_crop(x_chw, *box.tolist(), size=[24, 24], antialias=True)
        expected = (crop.flip(-1) if flip else crop).float()
        assert (view - expected).abs().max() <= 1


def test_a_training_view_is_some_crop_perhaps_mirrored() -> None:
    x_bchw = prepared(SMALL, 40)
    seen_flips, seen_corners = set(), set()
    views = SMALL.training_view(x_bchw, view_seeds(0, 0, range(40)))
    for x_chw, view_chw in zip(x_bchw, views, strict=True):
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(view_chw, naive_view(x_chw, top, left, flip))
        ]
        assert len(matches) == 1
        seen_corners.add(matches[0][:2])
        seen_flips.add(matches[0][2])
    assert seen_flips == {True, False}
    assert len(seen_corners) > 20


def naive_view(x_chw: torch.Tensor, top: int, left: int, flip: bool) -> torch.Tensor:
    crop_chw = x_chw[:, top : top + 24, left : left + 24]
    crop_chw = crop_chw.flip(2) if flip else crop_chw
    mean_c11 = 255 * torch.tensor(SMALL.mean)[:, None, None]
    std_c11 = 255 * torch.tensor(SMALL.std)[:, None, None]
    return (crop_chw.float() - mean_c11) / std_c11


def test_every_corner_and_both_directions_are_equally_likely() -> None:
    whole = Preprocessing(size_px=2, crop_ratio=0.5, mean=(0.0,), std=(1.0,), channels=1)
    numbered = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(9000, 1, 4, 4)
    views = whole.training_view(numbered, view_seeds(3, 1, range(9000))).mul(255).round().int()
    corner, mirrored = views[:, 0].amin((1, 2)), views[:, 0, 0, 0] > views[:, 0, 0, 1]
    counts = torch.bincount(corner, minlength=16)
    assert sorted(corner.unique().tolist()) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert counts[counts > 0].min() > 850 and counts.max() < 1150
    assert 0.47 < mirrored.float().mean() < 0.53


@pytest.mark.parametrize("scale", [None, (0.4, 1.0)])
def test_no_flip_without_hflip(scale: tuple[float, float] | None) -> None:
    upright = Preprocessing.from_json({**SMALL.to_json(), "hflip": False})
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(50, 3, 32, 32).contiguous()
    views = upright.training_view(ramp, range(50), scale=scale)
    assert (views[..., -1] > views[..., 0]).all()


@pytest.mark.parametrize("scale", [None, (0.5, 1.0)])
def test_a_view_depends_on_its_own_seed_only(scale: tuple[float, float] | None) -> None:
    x_bchw = prepared(SMALL, 16)
    seeds = view_seeds(7, 3, range(16))
    together = SMALL.training_view(x_bchw, seeds, scale=scale)
    alone = [
        SMALL.training_view(x_bchw[i : i + 1], [int(seeds[i])], scale=scale) for i in range(16)
    ]
    backwards = SMALL.training_view(x_bchw.flip(0), seeds.flip(0), scale=scale).flip(0)
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, backwards)
    assert not torch.equal(together, SMALL.training_view(x_bchw, seeds + 1, scale=scale))


@pytest.mark.parametrize("scale", [None, (0.5, 1.0)])
def test_views_leave_the_global_generators_alone(scale: tuple[float, float] | None) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    SMALL.training_view(prepared(SMALL, 4), range(4), scale=scale)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_views_are_the_same_in_every_release() -> None:
    """Golden: a change here changes what a resumed training sees."""
    assert view_seeds(0, 0, [0, 1]).tolist() == [2558736989570252433, 4764156602392020899]
    assert view_seeds(1, 0, [0]).tolist() != view_seeds(0, 1, [0]).tolist()
    whole = Preprocessing(size_px=2, crop_ratio=0.125, mean=(0.0,), std=(1.0,), channels=1)
    numbered = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3, 1, 16, 16)
    corners = whole.training_view(numbered, [0, 1, -1])[:, 0, 0].mul(255).round().int()
    assert corners.tolist() == [[41, 40], [172, 173], [230, 231]]


def test_seeds_of_an_epoch_are_distinct() -> None:
    seeds = torch.cat([view_seeds(seed, epoch, range(1000)) for seed in (0, 1) for epoch in (0, 1)])
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == 4000
    assert torch.equal(view_seeds(0, 0, torch.tensor([5, 3])), view_seeds(0, 0, [5, 3]))


def test_a_scaled_view_shows_a_box_of_that_area() -> None:
    plain = Preprocessing(size_px=64, mean=(0.0,), std=(1.0,), channels=1, hflip=False)
    ramp = torch.arange(73, dtype=torch.uint8).mul(3).expand(300, 1, 73, 73).contiguous()
    views = plain.training_view(ramp, range(300), scale=(0.25, 0.5)).mul(255)
    widths = (views[:, 0, 0, -1] - views[:, 0, 0, 0]) / 3 / 63 * 64
    assert widths.min() > 73 * math.sqrt(0.25 * 3 / 4) - 2.5
    assert widths.max() < 73 * math.sqrt(0.5 * 4 / 3) + 2.5
    assert widths.std() > 3


def test_scaled_boxes_reach_every_edge_and_have_the_drawn_area_and_shape() -> None:
    draws_bk = np.random.default_rng(0).random((4000, 5))
    top, left, height, width = _boxes(draws_bk, 20, (0.3, 0.6)).T
    for start, side in ((top, height), (left, width)):
        assert start.min() == 0 and side.min() >= 1
        assert (start + side).max() == 20
    area, aspect = 400 * (0.3 + 0.3 * draws_bk[:, 3]), width / height
    assert np.abs(height * width - area).max() < 20  # both sides are rounded
    assert np.abs(height * width - area).mean() < 6
    wanted = np.exp((2 * draws_bk[:, 4] - 1) * np.log(4 / 3))
    assert np.abs(aspect / wanted - 1).max() < 0.12


def test_views_of_the_whole_and_of_nothing() -> None:
    whole = Preprocessing(size_px=32, crop_ratio=1.0, mean=(0.0,) * 3, std=(1.0,) * 3, hflip=False)
    x_bchw = prepared(whole, 2)
    assert whole.training_view(x_bchw, [0, 1], scale=(1.0, 1.0)).shape == (2, 3, 32, 32)
    for scale in (None, (0.5, 1.0)):
        assert whole.training_view(x_bchw[:0], [], scale=scale).shape == (0, 3, 32, 32)


def test_wrong_arguments_of_views_are_refused() -> None:
    x_bchw = prepared(SMALL, 2)
    with pytest.raises(DataError, match="2 images came with 3 seeds"):
        SMALL.training_view(x_bchw, [0, 1, 2])
    with pytest.raises(DataError, match=r"asked of torch.float32 \(2, 3, 32, 32\); expected"):
        SMALL.evaluation_view(x_bchw.float())
    with pytest.raises(DataError, match=r"expected torch.uint8 \(b, 3, 32, 32\)"):
        SMALL.training_view(x_bchw[:, :, :31], [0, 1])
    for scale in ((0.0, 1.0), (0.6, 0.5), (0.5, 1.1)):
        with pytest.raises(DataError, match="expected 0 < lo <= hi <= 1 of the area"):
            SMALL.training_view(x_bchw, [0, 1], scale=scale)


def test_views_are_fast_enough() -> None:
    preprocessing = Preprocessing(size_px=64)
    x_bchw, seeds = prepared(preprocessing, 256), view_seeds(0, 0, range(256))
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        preprocessing.training_view(x_bchw, seeds)
        best = min(best, time.process_time() - start)
    assert 256 / best > 5000


def test_for_a_timm_backbone() -> None:
    model = timm.create_model("resnet18.a1_in1k", pretrained=False, num_classes=0)
    found = Preprocessing.for_backbone(model)
    assert (found.size_px, found.crop, found.crop_ratio) == (224, "center", 0.95)
    assert (found.interpolation, found.mean[0], found.channels) == ("bicubic", 0.485, 3)
    smaller = Preprocessing.for_backbone(model, size_px=64, hflip=False)
    assert (smaller.size_px, smaller.hflip, smaller.prepared_px) == (64, False, 67)


def test_for_a_squashing_timm_backbone() -> None:
    model = nn.Conv2d(3, 4, 3)
    model.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (3, 96, 96),
        "crop_mode": "squash",
        "crop_pct": 1.0,
        "interpolation": "lanczos",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    found = Preprocessing.for_backbone(model)
    assert (found.crop, found.prepared_px, found.interpolation) == ("squash", 96, "bicubic")
    assert found.std == (0.5, 0.5, 0.5)


def test_for_a_users_own_module() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 3))
    found = Preprocessing.for_backbone(model)
    assert (found.channels, found.size_px, found.interpolation) == (1, 224, "bilinear")
    assert found.mean == pytest.approx((0.449,), abs=1e-9)
    assert Preprocessing.for_backbone(nn.Linear(3, 3)).channels == 3
    with pytest.raises(DataError, match="takes images of 4 channels; images have 1 or 3"):
        Preprocessing.for_backbone(nn.Conv2d(4, 8, 3))
