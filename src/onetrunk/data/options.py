"""Options: what every kind of source is told besides its own name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

Fractions = tuple[float, float, float]


@dataclass(frozen=True)
class Options:
    """fractions, seed: how to cut a source without splits. cache_dir: None is the usual place."""

    fractions: Fractions = (0.7, 0.15, 0.15)
    seed: int = 0
    cache_dir: Path | None = None

    def downloads(self) -> Path:
        """The folder for downloads: `cache_dir`, else $XDG_CACHE_HOME or ~/.cache, /onetrunk."""
        if self.cache_dir is not None:
            return self.cache_dir
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onetrunk"
