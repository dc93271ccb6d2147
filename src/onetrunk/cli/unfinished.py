"""The folder of a bank that is being made: whole under its name, or what --resume goes on from.

A bank gets its name when it is whole. One whose domains are still to be tuned waits for it as
`NAME.unfinished`, with what was asked for and what is known in a file beside its checkpoints.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..bank.folder import UNFINISHED
from ..bank.lock import one_at_a_time
from ..errors import BankError
from ..files import DISK, reason, write_atomically
from ..training.checkpoint import differences

STATE = "compress.json"


def unfinished_path(out: Path) -> Path:
    """Where the bank `out` waits until its domains are tuned."""
    return out.with_name(f"{out.name}.unfinished")


def alone(out: Path) -> AbstractContextManager[None]:
    """For one process at a time that makes the bank `out`, in a folder that can be written.

    Raises:
        BankError: where there is another, or the file system refuses.
    """
    if not out.parent.is_dir():
        raise BankError(f"cannot write beside {out}: there is no folder {out.parent}.")
    busy = BankError(f"{out} is being made by another process. Wait for it, or give another --out.")
    lock = out.with_name(f"{out.name}.unfinished.lock")  # the longest name that is needed
    return one_at_a_time(lock, busy, BankError, f"cannot write beside {out}")


def stopped(out: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is known of the unfinished bank of `out`, if there is one.

    Raises:
        BankError: where it is of another request, or is none.
    """
    folder = unfinished_path(out)
    if not os.path.lexists(folder):
        return None
    try:
        state = json.loads((folder / UNFINISHED / STATE).read_text())
        saved, known = state["asked"], state["known"]
    except (OSError, ValueError, TypeError, KeyError):
        raise BankError(
            f"{folder} is no compression that was stopped. Move it, or give another --out."
        ) from None
    if different := differences(saved, asked):
        raise BankError(
            f"{folder} is another compression (- its, + this one's): {'; '.join(different)}. Say "
            "what was said then, or remove it to start over."
        )
    return dict(known)


@contextmanager
def beside(out: Path, asked: Mapping[str, Any], known: Mapping[str, Any] | None) -> Iterator[Path]:
    """A folder that is gone if it is never filled; then its name is `out`, or where something is
    `known` with which to go on, that of an unfinished one.

    Raises:
        BankError: where the file system refuses.
    """
    place = out if known is None else unfinished_path(out)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".onetrunk-", dir=out.parent))
    except OSError as error:
        raise BankError(f"cannot write beside {out}: {reason(error)}") from error
    try:
        yield folder / "bank"
        if known is not None:
            state = json.dumps({"asked": asked, "known": known}, indent=1).encode()
            (folder / "bank" / UNFINISHED).mkdir()
            write_atomically(folder / "bank" / UNFINISHED / STATE, state)
        os.rename(folder / "bank", place)  # fails where somebody was faster
        DISK.sync_folder(out.parent)
    except OSError as error:
        raise BankError(f"cannot write {place}: {reason(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish(out: Path) -> None:
    """Gives the unfinished bank of `out` its name.

    Raises:
        BankError: where the file system refuses.
    """
    try:
        os.rename(unfinished_path(out), out)
        DISK.sync_folder(out.parent)
    except OSError as error:
        raise BankError(f"cannot write {out}: {reason(error)}") from error
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
