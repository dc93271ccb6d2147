"""Ledger: finished cells and trials as JSON lines; several processes append, any run goes on.

A line is one record with its `key`, the digest of the configuration it was computed with. Lines are
only ever added, under a lock, so a study grows over several runs; ledgers of several machines are
joined by putting their files into one folder. A last line that a kill cut off is left out.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import TrainingError


def digest_of(configuration: Mapping[str, Any]) -> str:
    """16 hexadecimal digits: equal for equal configurations, whatever the order of their keys."""
    text = json.dumps(configuration, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """The records below one folder: reads every `*.jsonl`, writes `cells.jsonl`.

    >>> import tempfile
    >>> ledger = Ledger(Path(tempfile.mkdtemp()))
    >>> ledger.append({"key": "ab", "accuracy": 0.5})
    >>> ledger.read()["ab"]["accuracy"]
    0.5
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "cells.jsonl"

    def read(self) -> dict[str, dict[str, Any]]:
        """Key -> record; of two with one key, the first that was written.

        Raises:
            TrainingError: where a line that is not the last of its file is no record.
        """
        records: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for record in _records(path):
                records.setdefault(record["key"], record)
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record; a reader sees it whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, allow_nan=False)
        with FileLock(f"{self.path}.lock"), self.path.open("a+b") as file:
            file.seek(0)
            *_, last = file.read().split(b"\n")
            if last and _is_record(last):  # an editor left the end of the line out
                file.write(b"\n")
            elif last:  # a kill cut it off
                file.truncate(file.tell() - len(last))
            file.write(line.encode() + b"\n")


def _is_record(line: bytes | str) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "key" in record


def _records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        if _is_record(line):
            records.append(json.loads(line))
        elif number < len(lines):  # the last one may be cut off by a kill
            raise TrainingError(
                f"{path}, line {number} is no record of a study. Remove that line; "
                "its cell is computed again."
            )
    return records
