"""builtin:glyphs, the letters A to Z drawn in the fonts that come with matplotlib.

Each letter is drawn at a random size, angle, place and contrast, with noise. Whole font families
are held out: a network is tested on fonts it has never seen.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from onetrunk.data.builtin.bundled import bundled_file
from onetrunk.data.images import Images
from onetrunk.data.splits import Splits

SIZE_PX = 32
REPEATS = 4  # drawings of each letter in each font
TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
)
VAL_FONTS = ("cmr10", "cmb10", "cmss10", "cmtt10")
TEST_FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")


def glyphs() -> Splits:
    """26 classes of 32 x 32 grey pixels: 1248 / 416 / 416 images of 12 / 4 / 4 fonts."""
    return Splits(
        train=_drawn(TRAIN_FONTS, seed=0),
        val=_drawn(VAL_FONTS, seed=1),
        test=_drawn(TEST_FONTS, seed=2),
        classes=tuple(string.ascii_uppercase),
        name="glyphs",
        hflip=False,
        description="letters A to Z; validation and test in fonts that train does not have",
    )


def _drawn(fonts: Sequence[str], seed: int) -> Images:
    random = np.random.default_rng(seed)
    arrays, labels, names = [], [], []
    for font in fonts:
        path = bundled_file("matplotlib", f"fonts/ttf/{font}.ttf")
        for label, letter in enumerate(string.ascii_uppercase):
            for repeat in range(REPEATS):
                arrays.append(_letter(letter, path, random))
                labels.append(label)
                names.append(f"{letter} in {font}, drawing {repeat}")
    return Images.from_arrays(arrays, labels, tuple(string.ascii_uppercase), names)


def _letter(letter: str, font: Path, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One drawing (h, w): dark on light or light on dark."""
    canvas = Image.new("L", (2 * SIZE_PX, 2 * SIZE_PX))
    centre = SIZE_PX + random.uniform(-3, 3, size=2)
    drawn = ImageFont.truetype(str(font), int(random.integers(18, 30)))
    ImageDraw.Draw(canvas).text(tuple(centre.tolist()), letter, 255, drawn, anchor="mm")
    canvas = canvas.rotate(random.uniform(-15, 15), Image.Resampling.BICUBIC)
    margin = SIZE_PX // 2
    ink_hw = np.asarray(canvas.crop((margin, margin, margin + SIZE_PX, margin + SIZE_PX))) / 255
    paper, colour = random.uniform(0, 90), random.uniform(140, 255)
    if random.random() < 0.5:
        paper, colour = colour, paper
    grey_hw = paper + (colour - paper) * ink_hw + random.normal(0, 12, size=ink_hw.shape)
    return np.clip(np.round(grey_hw), 0, 255).astype(np.uint8)
