"""html: a report as one HTML file that needs nothing else: pictures and rows are inside it.

jinja2, imported when the page is rendered, escapes every text that comes from the rows.
"""

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from .compose import Report
from .look import require_extra

TEMPLATE = "report.html.jinja"


def page(report: Report, rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole page, with `rows` embedded as JSON.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    require_extra()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text("utf-8"))
    return template.render(report=report, rows=list(map(dict, rows)))
