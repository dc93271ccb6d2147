"""Locks for long work that two processes would write over each other: held while it is done."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from onetrunk.bank.folder import UNFINISHED
from onetrunk.errors import BankError, OnetrunkError
from onetrunk.files import DISK, reason


class BusyError(BankError):
    """A name that another process is training into the same bank."""


@contextmanager
def one_at_a_time(
    lock: Path, busy: OnetrunkError, kind: type[OnetrunkError], refused: str
) -> Iterator[None]:
    """Holds `lock` for the block; its folder is made where there is none.

    Raises:
        OnetrunkError: `busy` where another process holds it; of `kind`, with `refused` and the
            reason, where the file system does not let it.
    """
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(DISK.lock(lock, 0.0))
        except TimeoutError:
            raise busy from None
        except OSError as error:
            raise kind(f"{refused}: {reason(error)}") from error
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink(missing_ok=True)


@contextmanager
def one_training(bank: Path, name: str) -> Iterator[None]:
    """For one training of a name into the bank at `bank`: two would write over each other.

    Raises:
        BusyError: where another process trains it.
        BankError: where the file system refuses.
    """
    folder = bank / UNFINISHED
    busy = BusyError(
        f"{name!r} is being trained into {bank} by another process. Wait for it, or give another "
        "name."
    )
    refused = f"cannot train into bank {bank}"
    try:
        with one_at_a_time(folder / f"{name}.lock", busy, BankError, refused):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing else is under way
