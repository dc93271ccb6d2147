"""builtin:NAME, small domains made of real images that installed packages bring along.

Their splits are fixed, so that a number measured on one machine can be compared on another.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from onetrunk.data.builtin.faces import faces
from onetrunk.data.builtin.glyphs import glyphs
from onetrunk.data.builtin.patches import photos, science, textures
from onetrunk.data.options import Options
from onetrunk.data.splits import Splits
from onetrunk.errors import DataError

BUILTIN: Mapping[str, Callable[[], Splits]] = MappingProxyType(
    {
        "faces": faces,
        "glyphs": glyphs,
        "photos": photos,
        "science": science,
        "textures": textures,
    }
)


def load_builtin(name: str, options: Options) -> Splits:
    """Read one of BUILTIN; the options do not matter here. Raises DataError for another name."""
    del options
    if name in BUILTIN:
        return BUILTIN[name]()
    close = difflib.get_close_matches(name.lower(), BUILTIN, n=1, cutoff=0.5)
    meant = f" Did you mean builtin:{close[0]}?" if close else ""
    raise DataError(
        f"source 'builtin:{name}' is unknown.{meant} "
        f"There are builtin:{', builtin:'.join(BUILTIN)}."
    )
