"""The report of a study: rows of finished cells -> tables, pictures, one HTML file, JSON.

`write_report(rows, methods, out, name, command)` is all that a study needs; `require_extra()` says
before the study whether the report can be drawn after it.
"""

from .look import require_extra
from .rows import MethodLabel, Place, Row, read_rows
from .write import write_report

__all__ = ["MethodLabel", "Place", "Row", "read_rows", "require_extra", "write_report"]
