"""The Visual Decathlon (Rebuffi, Bilen and Vedaldi, NIPS 2017): ten domains, one score.

    kit = read_devkit("decathlon-1.0")
    plan = Settings(Parallel(), recipe=RELEASED)
    for name, step in train(kit, backbone, plan, "work"):
        print(name, step.step, step.n_steps, step.loss)
    print(conclude(kit, plan, "work", labels="labels_test").score)

Only the score needs no torch, so the rest is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .domains import DOMAINS as DOMAINS
from .domains import E_MAX as E_MAX
from .domains import Official as Official
from .scoring import points as points
from .scoring import score as score

_WHERE = {
    "Devkit": "files",
    "read_devkit": "files",
    "preprocessing": "protocol",
    "Settings": "run",
    "FailedDomainsError": "run",
    "train": "run",
    "steps_left": "run",
    "conclude": "run",
    "Report": "report",
    "read_results": "submission",
    "write_results": "submission",
    "score_results": "submission",
    "check_labels": "submission",
}

__all__ = ["DOMAINS", "E_MAX", "Official", "points", "score", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


if TYPE_CHECKING:
    from .files import Devkit as Devkit
    from .files import read_devkit as read_devkit
    from .protocol import preprocessing as preprocessing
    from .report import Report as Report
    from .run import FailedDomainsError as FailedDomainsError
    from .run import Settings as Settings
    from .run import conclude as conclude
    from .run import steps_left as steps_left
    from .run import train as train
    from .submission import check_labels as check_labels
    from .submission import read_results as read_results
    from .submission import score_results as score_results
    from .submission import write_results as write_results
