"""decode: every format and mode, and everything a file can be that is not an image."""

from __future__ import annotations

import io
import os
import pickle
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from onetrunk.data import decode
from onetrunk.data.decoding import FORMATS, BrokenImageError, Limits
from onetrunk.errors import DataError

Encode = Callable[..., bytes]


def distance(first: Image.Image, second: Image.Image) -> int:
    a, b = np.asarray(first).astype(int), np.asarray(second).astype(int)
    assert a.shape == b.shape
    return int(abs(a - b).max())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str, picture: Image.Image, encode: Encode) -> None:
    lossy = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    if kind == "GIF":
        picture = picture.convert("L")  # at most 256 colours
    decoded = decode(encode(picture, kind, **lossy.get(kind, {})))
    assert decoded.mode in ("RGB", "L")
    assert distance(decoded.convert("RGB"), picture.convert("RGB")) <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "PDF", "EPS", "JPEG2000", "DDS"])
def test_other_formats_are_refused(kind: str, picture: Image.Image, encode: Encode) -> None:
    try:
        encoded = encode(picture, kind)
    except OSError:
        pytest.skip(f"this Pillow does not write {kind}")
    with pytest.raises(DataError, match=r"'x\.png' cannot be read: it is not one of JPEG, PNG"):
        decode(encoded, name="x.png")


def test_bytes_paths_images_and_arrays_agree(
    tmp_path: Path, picture: Image.Image, encode: Encode
) -> None:
    encoded = encode(picture, "PNG")
    (tmp_path / "a.png").write_bytes(encoded)
    sources = [
        encoded,
        bytearray(encoded),
        memoryview(encoded),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        picture,
        np.asarray(picture),
        np.asarray(picture).transpose(2, 0, 1),
        np.asarray(picture).astype(np.float32) / 255,
        np.asarray(picture).astype(np.uint16) * 257,
    ]
    assert [distance(decode(source), picture) for source in sources] == [0] * len(sources)


def test_a_wrong_file_ending_does_not_matter(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "really.png", "BMP")
    assert distance(decode(tmp_path / "really.png"), picture) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncation_anywhere_is_an_error(kind: str, picture: Image.Image, encode: Encode) -> None:
    encoded = encode(picture, kind)
    whole = decode(encoded)
    for sixteenth in range(16):
        short = encoded[: len(encoded) * sixteenth // 16]
        try:
            image = decode(short, name="cut.jpg")
        except DataError as error:
            assert "'cut.jpg' cannot be read" in str(error)
        else:  # what was cut off were no pixels
            assert distance(image, whole) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_bytes_are_an_image_or_an_error(
    kind: str, picture: Image.Image, encode: Encode
) -> None:
    encoded = encode(picture, kind)
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(encoded)
        for place in random.integers(0, len(encoded), size=3):
            damaged[place] = random.integers(0, 256)
        with suppress(DataError):
            assert decode(bytes(damaged)).mode in ("RGB", "L")


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "it is empty (0 bytes)"),
        (b"hello, world", "it is not one of JPEG, PNG, WEBP, BMP, GIF, TIFF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is not one of"),
        (b"\xff\xd8\xff", "it is not one of"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "it is not one of"),
    ],
)
def test_no_images(encoded: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image '<bytes>' cannot be read") as refusal:
        decode(encoded)
    assert reason in str(refusal.value)
    (tmp_path / "no.jpg").write_bytes(encoded)
    with pytest.raises(DataError, match=r"no\.jpg' cannot be read"):
        decode(tmp_path / "no.jpg")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    reasons = {
        "pipe.jpg": "it is not a regular file",
        "folder.jpg": "it is not a regular file",
        "broken.jpg": "No such file or directory",
        "loop.jpg": "symbolic links",
        "absent.jpg": "No such file or directory",
        "nul\0.jpg": "null",
    }
    for name, reason in reasons.items():
        with pytest.raises(BrokenImageError) as refusal:
            decode(tmp_path / name)
        assert reason in refusal.value.reason
        assert refusal.value.name == str(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["naïve 图像.png", "two\nlines.png", "'quoted\".png", "\udcff.png"]
)
def test_odd_file_names(name: str, tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", tmp_path / name)
    assert decode(tmp_path / name).size == (48, 32)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read") as refusal:
        decode(tmp_path / name)
    assert "\n" not in str(refusal.value)
    str(refusal.value).encode()  # fit to be printed


def png_of_zeros(width: int, height: int) -> bytes:
    """A 1-bit PNG written by hand, so that no test needs its pixels in memory."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_bomb_is_refused_from_its_header() -> None:
    bomb = png_of_zeros(13300, 13300)
    assert len(bomb) < 30_000
    start = time.perf_counter()
    with pytest.raises(DataError, match="13300 x 13300 pixels are above the limit of 16777216"):
        decode(bomb)
    assert time.perf_counter() - start < 0.05


def test_a_bomb_beyond_pillows_own_limit_is_refused() -> None:
    header = png_of_zeros(8, 8)
    size = struct.pack(">II", 60000, 60000)
    body = b"IHDR" + size + header[24:29]
    bomb = header[:8] + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(DataError, match="too many pixels"):
        decode(bomb + header[33:])


def test_limits_can_be_set(tmp_path: Path, picture: Image.Image, encode: Encode) -> None:
    encoded = encode(picture, "PNG")
    decode(encoded, limits=Limits(max_pixels=48 * 32, max_bytes=len(encoded)))
    with pytest.raises(DataError, match="its 48 x 32 pixels are above the limit of 1535"):
        decode(encoded, limits=Limits(max_pixels=48 * 32 - 1))
    with pytest.raises(DataError, match=f"its {len(encoded)} bytes are above the limit of 10"):
        decode(encoded, limits=Limits(max_bytes=10))
    (tmp_path / "large.png").write_bytes(encoded)
    with pytest.raises(DataError, match=r"large.png.* bytes are above the limit of 10"):
        decode(tmp_path / "large.png", limits=Limits(max_bytes=10))
    with pytest.raises(DataError, match="above the limit of 10"):
        decode(picture, limits=Limits(max_pixels=10))


def test_nothing_of_pillow_or_warnings_is_changed(encode: Encode, picture: Image.Image) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    decode(encode(picture, "TIFF"))
    with pytest.raises(DataError):
        decode(png_of_zeros(13300, 13300))
    after = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    assert after == before


def test_the_result_does_not_depend_on_warning_filters(
    picture: Image.Image, encode: Encode
) -> None:
    """A damaged EXIF block makes Pillow warn; the pixels are fine."""
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08" + b"\0\x02" + b"\x01\x12\0\x02\xff\xff\xff\xff" * 2
    encoded = encode(picture, "JPEG", exif=exif)
    sizes = []
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            sizes.append(decode(encoded).size)
    assert sizes == [(48, 32), (48, 32)]


def test_threads_decode_at_once(picture: Image.Image, encode: Encode) -> None:
    files = [encode(picture, kind) for kind in ("JPEG", "PNG", "TIFF")] * 10
    before, decoded = list(warnings.filters), []

    def work() -> None:
        decoded.extend(decode(encoded).size for encoded in files)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decoded == [(48, 32)] * 180
    assert list(warnings.filters) == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(
    kind: str, orientation: int, picture: Image.Image, encode: Encode
) -> None:
    stored = {  # how a camera held that way would have stored the picture
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](picture)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    decoded = decode(encode(stored, kind, exif=exif, **options.get(kind, {})))
    assert distance(decoded, picture) <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_upright(
    orientation: int, picture: Image.Image, encode: Encode
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert distance(decode(encode(picture, "PNG", exif=exif)), picture) == 0


def test_cmyk_and_ycck_become_rgb(picture: Image.Image, encode: Encode) -> None:
    smooth = picture.resize((48, 32), Image.Resampling.BILINEAR)
    cmyk = encode(smooth.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in cmyk  # so its values are inverted
    assert distance(decode(cmyk), smooth) <= 10
    assert distance(decode(encode(smooth.convert("CMYK"), "TIFF")), smooth) == 0
    # YCCK: the planes are Y, Cb and Cr of the inverted picture, and the Adobe marker says 2
    ycc = ImageOps.invert(smooth).convert("YCbCr")
    planes = [ImageOps.invert(plane) for plane in ycc.split()]  # Pillow inverts as it writes
    ycck = Image.merge("CMYK", [*planes, Image.new("L", smooth.size, 0)])
    encoded = bytearray(encode(ycck, "JPEG", quality=100, subsampling=0))
    encoded[encoded.index(b"Adobe") + 11] = 2
    assert Image.open(io.BytesIO(encoded)).info["adobe_transform"] == 2
    assert distance(decode(bytes(encoded)), smooth) <= 10


def test_alpha_is_over_white() -> None:
    for mode, colour, expected in [
        ("RGBA", (100, 50, 0, 255), (100, 50, 0)),
        ("RGBA", (100, 50, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (100, 255), 100),
        ("LA", (100, 0), 255),
        ("LA", (0, 51), 204),
    ]:
        buffer = io.BytesIO()
        Image.new(mode, (3, 2), colour).save(buffer, "PNG")
        decoded = decode(buffer.getvalue())
        assert decoded.mode == ("L" if mode == "LA" else "RGB")
        assert decoded.getpixel((1, 1)) == expected


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha(mode: str) -> None:
    straight = Image.new("RGBA" if mode == "RGBa" else "LA", (2, 2), 0)
    assert decode(straight.convert(mode)).getextrema() in [(255, 255), ((255, 255),) * 3]


def test_palettes(encode: Encode) -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0, 255, 255, 255])
    image.putdata([0, 1, 2, 3])
    plain = decode(encode(image, "PNG"))
    assert [plain.getpixel((x, 0)) for x in range(4)] == [
        (10, 20, 30),
        (200, 100, 50),
        (0, 0, 0),
        (255, 255, 255),
    ]
    one_clear = decode(encode(image, "PNG", transparency=1))
    assert one_clear.getpixel((1, 0)) == (255, 255, 255)
    assert one_clear.getpixel((0, 0)) == (10, 20, 30)
    graded = decode(encode(image, "PNG", transparency=bytes([255, 255, 51, 255])))
    assert graded.getpixel((2, 0)) == (204, 204, 204)
    gif = decode(encode(image, "GIF", transparency=2))
    assert gif.convert("RGB").getpixel((2, 0)) == (255, 255, 255)


def test_a_transparent_colour_is_white(encode: Encode) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    decoded = decode(encode(image, "PNG", transparency=(1, 2, 3)))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (9, 9, 9)]
    grey = Image.new("L", (2, 1), 7)
    assert decode(encode(grey, "PNG", transparency=7)).getextrema() == (255, 255)


def test_one_bit_and_one_pixel(encode: Encode) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    decoded = decode(encode(image, "PNG"))
    assert (decoded.mode, decoded.getpixel((0, 0)), decoded.getpixel((1, 0))) == ("L", 0, 255)
    assert decode(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits(kind: str, encode: Encode) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    decoded = decode(encode(Image.fromarray(values), kind))
    assert decoded.mode == "L"
    assert np.asarray(decoded).tolist() == [[0, 1, 100, 255]]


def test_sixteen_bits_as_an_older_pillow_opens_them() -> None:
    image = Image.new("I", (1, 1), 25700)
    image.format = "PNG"
    assert decode(image).getpixel((0, 0)) == 100


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([0, 1, 2], np.int32, [0, 1, 2]),
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 0.1, 0.2], np.float32, [0, 26, 51]),
    ],
)
def test_wide_grey_tiffs(
    values: list[float], dtype: type, expected: list[int], encode: Encode
) -> None:
    image = Image.fromarray(np.array([values], dtype=dtype))
    assert np.asarray(decode(encode(image, "TIFF"))).tolist() == [expected]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([-1, 5], np.int32), ([0, 256], np.int32), ([0, 1.5], np.float32), ([0, np.nan], np.float32)],
)
def test_wide_grey_without_a_meaning_is_refused(
    values: list[float], dtype: type, encode: Encode
) -> None:
    encoded = encode(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")
    with pytest.raises(DataError, match=r"grey values run from .* store it with 8 or 16 bits"):
        decode(encoded)


def test_other_colour_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(Image.new("HSV", (2, 2))).mode == "RGB"
    assert decode(Image.new("YCbCr", (2, 2), (255, 128, 128))).getpixel((0, 0)) == (255, 255, 255)

    def refuse(image: Image.Image, mode: str) -> Image.Image:
        raise ValueError("conversion not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(DataError, match="no way from mode LAB to RGB"):
        decode(Image.new("LAB", (2, 2)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_many_frames(kind: str, encode: Encode) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(encoded).convert("RGB").getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4), np.int64), "an array of int64; give uint8, uint16, bool or floats"),
        (np.zeros((4, 4, 2), np.uint8), r"an array of shape \(4, 4, 2\); give \(h, w\)"),
        (np.zeros(4, np.uint8), r"an array of shape \(4,\)"),
        (np.zeros((0, 4), np.uint8), "it has no pixels"),
        (np.full((2, 2), 1.5), "a float array from 1.5 to 1.5; floats must be in"),
        (np.full((2, 2), -0.1), "a float array from -0.1"),
        (np.full((2, 2), np.nan), "a float array from nan"),
        (np.array([["a"]]), "an array of <U1"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, reason: str) -> None:
    with pytest.raises(DataError, match=f"image '<array>' cannot be read: .*{reason}"):
        decode(array)


def test_arrays_of_every_kind() -> None:
    assert np.asarray(decode(np.array([[True, False]]))).tolist() == [[255, 0]]
    assert decode(np.zeros((5, 7, 1), np.uint8)).mode == "L"
    assert decode(np.zeros((1, 5, 7), np.uint8)).size == (7, 5)
    assert decode(np.zeros((5, 7, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)
    assert np.asarray(decode(np.array([[0.0, 0.5, 1.0]]))).tolist() == [[0, 128, 255]]


def test_what_is_no_source_at_all() -> None:
    with pytest.raises(DataError, match="a NoneType is no image; give bytes, a path"):
        decode(None)  # type: ignore[arg-type]


def test_the_callers_image_is_left_alone(picture: Image.Image) -> None:
    before = picture.tobytes()
    decoded = decode(picture)
    decoded.putpixel((0, 0), (1, 1, 1))
    assert picture.tobytes() == before


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(BrokenImageError("a.png", "it is empty")))  # noqa: S301
    assert (error.name, error.reason) == ("a.png", "it is empty")
    assert str(error) == "image 'a.png' cannot be read: it is empty."
