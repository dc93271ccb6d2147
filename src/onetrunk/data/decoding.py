"""decode: bytes, a file, a PIL image or an array -> an upright 8-bit RGB or grey image.

Formats: JPEG PNG WEBP BMP GIF TIFF, the first frame. The size is checked in the header, before a
pixel is decoded. Transparency is composited over white (but for that of 16-bit values, which are
scaled to 8), EXIF orientation applied, CMYK and YCCK become RGB. No setting of Pillow is changed.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from onetrunk.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
Array: TypeAlias = npt.NDArray[np.generic]
ImageSource: TypeAlias = "bytes | str | os.PathLike[str] | Image.Image | Array"

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY_MODES = ("1", "L", "LA", "La")
_QUIET = threading.Lock()  # warnings.catch_warnings changes a list that all threads share


class BrokenImageError(DataError):
    """An image that cannot be read: its name, and the reason in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {name!r} cannot be read: {reason}.")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[BrokenImageError], tuple[str, str]]:
        return BrokenImageError, (self.name, self.reason)  # so that it crosses to other processes


@dataclass(frozen=True)
class Limits:
    """What an image may cost: pixels (width x height, read from the header) and encoded bytes."""

    max_pixels: int = 4096 * 4096
    max_bytes: int = 64 * 2**20


def decode(
    source: ImageSource, *, name: str | None = None, limits: Limits | None = None
) -> Image.Image:
    """Decode one image to PIL mode "RGB", or "L" where it is grey.

    source: encoded bytes, a path, a PIL image, or an array: uint8, uint16, bool, or float in
    [0, 1]; shape (h, w), (h, w, c) or (c, h, w) with c of 1 or 3, or (h, w, 4) with alpha.
    name: what an error calls it (default: the path). Raises DataError with the name and the reason
    for anything empty, truncated, foreign, or over `limits`.

    >>> decode(np.zeros((4, 6, 3), dtype=np.uint8)).size
    (6, 4)
    """
    limits = limits or Limits()
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode_bytes(bytes(source), name or "<bytes>", limits)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        name = name or str(path)
        return _decode_bytes(_read(path, name, limits), name, limits)
    if isinstance(source, Image.Image):
        return _upright_8bit(source, name or "<image>", limits)
    if isinstance(source, np.ndarray):
        name = name or "<array>"
        return _upright_8bit(_from_array(source, name), name, limits)
    raise BrokenImageError(
        name or "<image>",
        f"a {type(source).__name__} is no image; give bytes, a path, a PIL image or an array",
    )


def _read(path: Path, name: str, limits: Limits) -> bytes:
    try:
        status = path.stat()
        # opening a FIFO would wait for ever
        if not stat.S_ISREG(status.st_mode):
            raise BrokenImageError(name, "it is not a regular file")
        _check_bytes(status.st_size, name, limits)
        return path.read_bytes()
    except OSError as error:
        raise BrokenImageError(name, error.strerror or type(error).__name__) from error
    except ValueError as error:  # a NUL in the path
        if isinstance(error, DataError):
            raise
        raise BrokenImageError(name, str(error)) from error


def _check_bytes(n_bytes: int, name: str, limits: Limits) -> None:
    if n_bytes == 0:
        raise BrokenImageError(name, "it is empty (0 bytes)")
    if n_bytes > limits.max_bytes:
        raise BrokenImageError(
            name, f"its {n_bytes} bytes are above the limit of {limits.max_bytes}"
        )


def _decode_bytes(encoded: bytes, name: str, limits: Limits) -> Image.Image:
    _check_bytes(len(encoded), name, limits)
    try:
        with _quiet():
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BrokenImageError(name, f"it is not one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BrokenImageError(name, f"too many pixels: {error}") from error
    except Exception as error:  # Pillow's parsers raise a dozen kinds on damaged headers
        raise BrokenImageError(name, f"damaged header: {_said(error)}") from error
    with image:
        return _upright_8bit(image, name, limits)


def _upright_8bit(image: Image.Image, name: str, limits: Limits) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise BrokenImageError(name, f"it has no pixels ({width} x {height})")
    if width * height > limits.max_pixels:
        raise BrokenImageError(
            name, f"its {width} x {height} pixels are above the limit of {limits.max_pixels}"
        )
    try:
        # only these two warn while they load; the others decode in parallel threads
        with _quiet() if image.format in ("PNG", "TIFF") else nullcontext():
            image.load()
        with _quiet():
            orientation = _orientation(image)
    except Exception as error:  # as above, and OSError for a truncated file
        raise BrokenImageError(name, f"damaged or truncated: {_said(error)}") from error
    plain = _plain(image, name)
    return plain.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else plain


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF does not spoil the pixels
        return 1


def _plain(image: Image.Image, name: str) -> Image.Image:
    """Mode "L" or "RGB" of a loaded image, at its own orientation."""
    target = "L" if image.mode in _GREY_MODES else "RGB"
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values_hw = np.asarray(image)
        if image.mode == "I" and image.format == "PNG":  # 16 bits, before Pillow 11
            values_hw = values_hw.astype(np.uint16)
        return Image.fromarray(_eight_bits(values_hw, name))
    if image.mode == target and "transparency" not in image.info:
        return image.copy()
    try:
        if image.has_transparency_data:
            return _over_white(image).convert(target)
        return image.convert(target)
    except ValueError as error:
        raise BrokenImageError(name, f"no way from mode {image.mode} to RGB") from error


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBa", "La"):  # premultiplied
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba)


def _eight_bits(values_hw: Array, name: str) -> npt.NDArray[np.uint8]:
    """Grey values to 0..255 by what their type says: 16-bit 0..65535, wider 0..255, floats 0..1.

    Others are refused: a scale that an image's own values choose would change what a grey value
    means from one image to the next.
    """
    full = {"f": 1.0}.get(values_hw.dtype.kind, 65535.0 if values_hw.dtype.itemsize <= 2 else 255.0)
    low, high = float(values_hw.min()), float(values_hw.max())
    if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= full):
        raise BrokenImageError(
            name,
            f"its {values_hw.dtype} grey values run from {low:g} to {high:g}, and 0 to {full:g} "
            "are read; store it with 8 or 16 bits",
        )
    scaled_hw = values_hw.astype(np.float64) * (255.0 / full)
    return np.round(scaled_hw).astype(np.uint8)


def _from_array(array: Array, name: str) -> Image.Image:
    x_hwc = _channels_last(array, name)
    if x_hwc.size == 0:
        raise BrokenImageError(name, f"it has no pixels (shape {array.shape})")
    if x_hwc.dtype == np.bool_:
        x_hwc = x_hwc.astype(np.uint8) * np.uint8(255)
    elif x_hwc.dtype == np.uint16:
        x_hwc = np.round(x_hwc.astype(np.float64) / 257.0).astype(np.uint8)
    elif x_hwc.dtype.kind == "f":
        x_hwc = _from_unit_floats(x_hwc, name)
    elif x_hwc.dtype != np.uint8:
        raise BrokenImageError(
            name, f"an array of {array.dtype}; give uint8, uint16, bool or floats in [0, 1]"
        )
    x_hwc = np.ascontiguousarray(x_hwc)
    return Image.fromarray(x_hwc[:, :, 0] if x_hwc.shape[2] == 1 else x_hwc)


def _channels_last(array: Array, name: str) -> Array:
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        return array
    if array.ndim == 3 and array.shape[0] in (1, 3):
        return array.transpose(1, 2, 0)
    raise BrokenImageError(
        name, f"an array of shape {array.shape}; give (h, w), (h, w, c) or (c, h, w), c 1 or 3"
    )


def _from_unit_floats(x_hwc: Array, name: str) -> npt.NDArray[np.uint8]:
    low, high = float(x_hwc.min()), float(x_hwc.max())
    if not (low >= 0 and high <= 1):
        raise BrokenImageError(
            name, f"a float array from {low:g} to {high:g}; floats must be in [0, 1]"
        )
    return np.round(x_hwc.astype(np.float64) * 255.0).astype(np.uint8)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns about odd but readable files; the result must not depend on warning filters."""
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
