"""The folder of a bank that is being made: whole under its name, or what --resume goes on from.

A bank gets its name when it is whole. One whose domains are still to be tuned waits for it as
`NAME.unfinished`, with what was asked for in a file, so that another request does not go on there.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..bank.folder import UNFINISHED
from ..errors import BankError
from ..files import DISK, reason, write_atomically
from ..training.checkpoint import differences

ASKED = "asked.json"


def unfinished_path(out: Path) -> Path:
    """Where the bank `out` waits until its domains are tuned."""
    return out.with_name(f"{out.name}.unfinished")


def refuse_another(out: Path, asked: Mapping[str, Any], resume: bool) -> bool:
    """Whether there is a stopped run to go on from.

    Raises:
        BankError: where there is one that is not gone on with, or of another request.
    """
    folder = unfinished_path(out)
    if not os.path.lexists(folder):
        return False
    try:
        saved = json.loads((folder / ASKED).read_text())
    except (OSError, ValueError) as error:
        raise BankError(
            f"{folder} is there already, and no compression that was stopped ({error}). Move it, "
            "or give another --out."
        ) from None
    if not resume:
        raise BankError(
            f"{folder} is a compression that was stopped. Go on with --resume, or remove it."
        )
    if different := differences(saved, asked):
        raise BankError(
            f"{folder} is another compression (- its, + this one's): {'; '.join(different)}. Say "
            "what was said then, or remove it to start over."
        )
    return True


@contextmanager
def beside(out: Path, asked: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder that gets its name when it is filled, and is gone if it never is: `out`, or with
    `asked` the name of an unfinished one.

    Raises:
        BankError: where the file system refuses.
    """
    place = out if asked is None else unfinished_path(out)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".onetrunk-", dir=out.parent))
    except OSError as error:
        raise BankError(f"cannot write beside {out}: {reason(error)}") from error
    try:
        yield folder / "bank"
        if asked is not None:
            write_atomically(folder / "bank" / ASKED, json.dumps(asked, indent=1).encode())
        os.rename(folder / "bank", place)  # fails where somebody was faster
        DISK.sync_folder(out.parent)
    except OSError as error:
        raise BankError(f"cannot write {place}: {reason(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def finished(out: Path) -> Iterator[Path]:
    """The unfinished bank of `out`, for one process at a time; at the end it gets its name.

    Raises:
        BankError: where another process has it, or the file system refuses.
    """
    folder = unfinished_path(out)
    lock = folder / UNFINISHED / "compress.lock"
    try:
        lock.parent.mkdir(exist_ok=True)
        with DISK.lock(lock, 0.0):
            yield folder
            shutil.rmtree(folder / UNFINISHED)
            os.rename(folder, out)
        (out / ASKED).unlink()
        DISK.sync_folder(out.parent)
    except TimeoutError:
        raise BankError(f"{folder} is being tuned by another process. Wait for it.") from None
    except OSError as error:
        raise BankError(f"cannot write {out}: {reason(error)}") from error
