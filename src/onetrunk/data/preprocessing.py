"""Preprocessing that travels with a domain: image -> prepared square -> what the network sees.

    prepare          PIL image     -> uint8 (c, R, R), R = round(size_px / crop_ratio); once
    training_view    uint8 b c R R -> float (b, c, S, S): random crop and flip, drawn from seeds
    evaluation_view  uint8 b c R R -> float (b, c, S, S): the centre

The randomness of a training view is a pure function of one integer seed a sample: it depends
neither on the batch a sample is in, nor on the worker that loads it, nor on what was drawn before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from onetrunk.errors import DataError

Crop = Literal["center", "squash"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SIZE_PX = 4096
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of a random resized crop, as in Inception and since

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
_PIL_MODES = {1: "L", 3: "RGB"}
_DRAWS = 5  # top, left, flip, area, aspect ratio


@dataclass(frozen=True)
class Preprocessing:
    """How a domain turns an image into the network's input.

    size_px: side of the square the network sees. crop: "center" cuts the central square out of the
    image, "squash" ignores the aspect ratio. crop_ratio: the image is resized to
    round(size_px / crop_ratio), and the view is a size_px crop of that (also for squash).
    mean, std: one number a channel, for values in [0, 1]. hflip: a mirrored image has the same
    label. channels: 3 turns grey images into RGB, 1 turns colour into grey.

    Raises DataError for a value of the wrong type or out of range.

    >>> Preprocessing(size_px=64).prepared_px
    73
    """

    size_px: int = 224
    crop: Crop = "center"
    crop_ratio: float = 0.875
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    hflip: bool = True
    channels: Literal[1, 3] = 3

    def __post_init__(self) -> None:
        _check_number("size_px", self.size_px, int, 1, MAX_SIZE_PX)
        _check_choice("crop", self.crop, get_args(Crop))
        _check_number("crop_ratio", self.crop_ratio, float, 0.1, 1.0)
        _check_choice("interpolation", self.interpolation, get_args(Interpolation))
        _check_choice("channels", self.channels, (1, 3))
        _check_channel_numbers("mean", self.mean, self.channels, -1000.0)
        _check_channel_numbers("std", self.std, self.channels, 1e-6)
        if type(self.hflip) is not bool:
            raise _refused("hflip", self.hflip, "true or false")
        # one written form for equal values: an int mean of 0 and a list read from JSON included
        object.__setattr__(self, "crop_ratio", float(self.crop_ratio))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))

    @property
    def prepared_px(self) -> int:
        """Side R of a prepared image: round(size_px / crop_ratio)."""
        return round(self.size_px / self.crop_ratio)

    @classmethod
    def for_backbone(
        cls, model: nn.Module, size_px: int | None = None, hflip: bool = True
    ) -> Preprocessing:
        """What `model` was trained with: timm's `pretrained_cfg`, else ImageNet's numbers.

        size_px: the side in pixels (default: the configuration's, else 224). Channels are those of
        the model's first convolution; one channel takes the average of three means and deviations.
        Raises DataError if the model wants neither 1 nor 3 channels.
        """
        config = _timm_config(model)
        channels = _input_channels(model, default=len(config["mean"]))
        return cls(
            size_px=config["input_size"][-1] if size_px is None else size_px,
            crop="squash" if config["crop_mode"] == "squash" else "center",
            crop_ratio=min(1.0, float(config["crop_pct"])),
            interpolation=_known_interpolation(config["interpolation"]),
            mean=_for_channels(config["mean"], channels),
            std=_for_channels(config["std"], channels),
            hflip=hflip,
            channels=channels,
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `from_json` gives back an equal value."""
        values = asdict(self)
        return {**values, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read what `to_json` wrote. Raises DataError on a wrong key, type or range."""
        if not isinstance(values, Mapping):
            raise DataError(f"preprocessing must be a JSON object, found {values!r}.")
        expected = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - expected), sorted(expected - set(values))
        if unknown or missing:
            raise DataError(
                f"preprocessing has unknown keys {unknown} and lacks {missing}: "
                f"expected exactly {sorted(expected)}."
            )
        return cls(**values)

    def prepare(self, image: Image.Image) -> Tensor:
        """The resized square of one image: uint8 (c, R, R), the same bytes every time."""
        if image.mode != _PIL_MODES[self.channels]:
            image = image.convert(_PIL_MODES[self.channels])
        side = self.prepared_px
        box = _central_square(image.size, side) if self.crop == "center" else (0, 0, *image.size)
        resized = image.resize((side, side), _RESAMPLING[self.interpolation], box=box)
        x_hwc = np.array(resized, dtype=np.uint8).reshape(side, side, self.channels)
        return torch.from_numpy(np.ascontiguousarray(x_hwc.transpose(2, 0, 1)))

    def evaluation_view(self, prepared_bchw: Tensor) -> Tensor:
        """The central crop, normalised: uint8 (b, c, R, R) -> float32 (b, c, S, S)."""
        self._check_prepared(prepared_bchw)
        start = round((self.prepared_px - self.size_px) / 2)
        inside = slice(start, start + self.size_px)
        return self._normalise(prepared_bchw[:, :, inside, inside])

    def training_view(
        self,
        prepared_bchw: Tensor,
        seeds_b: Tensor | Sequence[int],
        *,
        scale: tuple[float, float] | None = None,
    ) -> Tensor:
        """A random view of each row: uint8 (b, c, R, R) -> float32 (b, c, S, S).

        seeds_b: one integer a row, the only source of randomness (see `view_seeds`).
        scale: None crops S out of R; (lo, hi) takes a box of lo..hi of the prepared area and an
        aspect ratio of 3/4..4/3 and resizes it to S (bilinear, antialiased).
        """
        self._check_prepared(prepared_bchw)
        draws_bk = _uniforms(seeds_b, len(prepared_bchw))
        if scale is None:
            cropped_bchw = self._random_crop(prepared_bchw, draws_bk)
        else:
            cropped_bchw = self._random_resized_crop(prepared_bchw, draws_bk, scale)
        return self._normalise(cropped_bchw)

    def _random_crop(self, prepared_bchw: Tensor, draws_bk: npt.NDArray[np.float64]) -> Tensor:
        side, n_places = self.size_px, self.prepared_px - self.size_px + 1
        device = prepared_bchw.device
        corners_b2 = torch.from_numpy((draws_bk[:, :2] * n_places).astype(np.int64)).to(device)
        along = torch.arange(side, device=device)
        rows_bh = corners_b2[:, :1] + along
        columns_bw = corners_b2[:, 1:] + along
        flipped_b = torch.from_numpy(self._flipped(draws_bk)).to(device)
        columns_bw = torch.where(flipped_b[:, None], columns_bw.flip(1), columns_bw)
        places_bp = (rows_bh[:, :, None] * self.prepared_px + columns_bw[:, None, :]).flatten(1)
        b, c = prepared_bchw.shape[:2]
        picked = prepared_bchw.flatten(2).gather(2, places_bp[:, None, :].expand(b, c, -1))
        return picked.view(b, c, side, side)

    def _random_resized_crop(
        self, prepared_bchw: Tensor, draws_bk: npt.NDArray[np.float64], scale: tuple[float, float]
    ) -> Tensor:
        boxes_b4, size = _boxes(draws_bk, self.prepared_px, scale), (self.size_px, self.size_px)
        # colours innermost: the order in which PyTorch resizes bytes fastest, with the same result
        prepared_bchw = prepared_bchw.contiguous(memory_format=torch.channels_last)
        views_bchw = torch.empty_like(prepared_bchw[:, :, : size[0], : size[1]])
        for row, (top, left, height, width) in enumerate(boxes_b4.tolist()):
            box = prepared_bchw[row : row + 1, :, top : top + height, left : left + width]
            views_bchw[row : row + 1] = _resized(box, size)
        flipped_b = torch.from_numpy(self._flipped(draws_bk)).to(views_bchw.device)
        return torch.where(flipped_b[:, None, None, None], views_bchw.flip(-1), views_bchw)

    def _flipped(self, draws_bk: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        return np.asarray((draws_bk[:, 2] < 0.5) & self.hflip)

    def _normalise(self, x_bchw: Tensor) -> Tensor:
        mean_c11 = 255.0 * torch.tensor(self.mean, device=x_bchw.device)[:, None, None]
        std_c11 = 255.0 * torch.tensor(self.std, device=x_bchw.device)[:, None, None]
        # two correctly rounded steps: the same bits whatever the batch, vector width or layout
        return (
            x_bchw.to(torch.float32, memory_format=torch.contiguous_format)
            .sub_(mean_c11)
            .div_(std_c11)
        )

    def _check_prepared(self, prepared_bchw: Tensor) -> None:
        expected = (self.channels, self.prepared_px, self.prepared_px)
        found = tuple(prepared_bchw.shape)
        if prepared_bchw.dtype != torch.uint8 or found[1:] != expected:
            raise DataError(
                f"a view was asked of {prepared_bchw.dtype} {found}; expected torch.uint8 "
                f"(b, {', '.join(map(str, expected))}): pass what `prepare` returned, stacked."
            )


def _resized(x_1chw: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (1, c, h, w) -> uint8 (1, c, *size), bilinear, antialiased."""
    if x_1chw.device.type == "cpu":
        return F.interpolate(x_1chw, size, mode="bilinear", antialias=True)
    y_1chw = F.interpolate(x_1chw.float(), size, mode="bilinear", antialias=True)
    return y_1chw.round_().clamp_(0, 255).to(torch.uint8)


def view_seeds(seed: int, epoch: int, indices_b: Tensor | Sequence[int]) -> Tensor:
    """One int64 seed for each example of an epoch, shape (b,): a hash of (seed, epoch, index)."""
    start = _mixed(_mixed(_as_uint64([seed])) + _as_uint64([epoch]))
    seeds_b = _mixed(start + _as_uint64(indices_b))
    return torch.from_numpy(seeds_b.view(np.int64))


def _as_uint64(integers: Tensor | Sequence[int]) -> npt.NDArray[np.uint64]:
    if isinstance(integers, Tensor):
        integers = integers.tolist()
    return np.array([integer & 0xFFFFFFFFFFFFFFFF for integer in integers], dtype=np.uint64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood, OOPSLA 2014): 64 bits in, 64 well-stirred bits out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniforms(seeds_b: Tensor | Sequence[int], n_rows: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), shape (b, _DRAWS): row j depends on seed j only."""
    seeds = _as_uint64(seeds_b)
    if len(seeds) != n_rows:
        raise DataError(f"{n_rows} images came with {len(seeds)} seeds; give one seed an image.")
    stream_bk = _mixed(seeds)[:, None] + np.arange(_DRAWS).astype(np.uint64)
    return (_mixed(_mixed(stream_bk)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _boxes(
    draws_bk: npt.NDArray[np.float64], side: int, scale: tuple[float, float]
) -> npt.NDArray[np.int64]:
    """Random boxes (top, left, height, width), shape (b, 4), inside a square of `side` pixels."""
    low, high = scale
    if not 0 < low <= high <= 1:
        raise DataError(f"scale={scale!r} asked for crops; expected 0 < lo <= hi <= 1 of the area.")
    area_b = (low + draws_bk[:, 3] * (high - low)) * side * side
    log_low, log_high = math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])
    aspect_b = np.exp(log_low + draws_bk[:, 4] * (log_high - log_low))
    sides_b2 = np.stack([np.sqrt(area_b / aspect_b), np.sqrt(area_b * aspect_b)], axis=1)
    sides_b2 = np.clip(np.round(sides_b2), 1, side)
    corners_b2 = np.floor(draws_bk[:, :2] * (side - sides_b2 + 1))
    return np.concatenate([corners_b2, sides_b2], axis=1).astype(np.int64)


def _central_square(size: tuple[int, int], wanted: int) -> tuple[float, float, float, float]:
    """Of whole pixels where it is not scaled: half a pixel beside would blur it."""
    width, height = size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if side == wanted:
        left, top = round(left), round(top)
    return left, top, left + side, top + side


def _timm_config(model: nn.Module) -> dict[str, Any]:
    own = getattr(model, "pretrained_cfg", None)
    if not own or not type(model).__module__.startswith("timm."):
        return {
            "input_size": (3, 224, 224),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "crop_pct": 0.875,
            "crop_mode": "center",
            "interpolation": "bilinear",
            **(own or {}),
        }
    from timm.data import resolve_model_data_config

    return dict(resolve_model_data_config(model))


def _known_interpolation(name: str) -> Interpolation:
    known: dict[str, Interpolation] = {"bilinear": "bilinear", "nearest": "nearest"}
    return known.get(name, "bicubic")  # lanczos, random, ...: the nearest relative we have


def _input_channels(model: nn.Module, default: int) -> Literal[1, 3]:
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convs, None)
    channels = getattr(model, "in_chans", None)
    if first is not None:
        channels = first.in_channels
    channels = default if channels is None else channels
    if channels == 1:
        return 1
    if channels == 3:
        return 3
    raise DataError(
        f"the backbone takes images of {channels} channels; images have 1 or 3. "
        "Build it with in_chans=3 or in_chans=1."
    )


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def _refused(name: str, value: object, expected: str) -> DataError:
    return DataError(f"preprocessing {name}={value!r} was asked for; expected {expected}.")


def _check_number(
    name: str, value: object, kind: type[int] | type[float], low: float, high: float
) -> None:
    """A number of this kind in low..high; an int is a float, a bool is neither."""
    kinds = (int,) if kind is int else (int, float)
    expected = f"{'an integer' if kind is int else 'a number'} from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise _refused(name, value, expected)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in choices:
        raise _refused(name, value, " or ".join(repr(choice) for choice in choices))


def _check_channel_numbers(name: str, values: object, channels: int, low: float) -> None:
    if not isinstance(values, tuple | list) or len(values) != channels:
        raise _refused(name, values, f"{channels} numbers, one a channel")
    for value in values:
        _check_number(name, value, float, low, 1000.0)
