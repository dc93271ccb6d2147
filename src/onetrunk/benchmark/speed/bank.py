"""A bank by its number of domains: opening it, and loading one of them.

Opening reads the manifest alone, loading one file: so opening may grow with the number, by little,
and loading may not.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...bank.bank import Bank
from .rounds import Call, Contest
from .subjects import Subject

N_DOMAINS = (3, 100, 1000)
N_TIMES = 10  # calls a round


def contests(subject: Subject, numbers: tuple[int, ...] = N_DOMAINS) -> Iterator[Contest]:
    """Banks of a growing number of domains over one backbone."""
    with tempfile.TemporaryDirectory() as folder:
        banks = {n: _filled(subject, Path(folder) / str(n), n) for n in numbers}
        first = banks[numbers[0]]
        megabytes = first.domains["domain-0"].size / 1e6
        opening = {_name(n): _repeated(partial(Bank.open, b.path)) for n, b in banks.items()}
        loading = {_name(n): _repeated(partial(b.load, "domain-0")) for n, b in banks.items()}
        for what, calls in (
            ("opening a bank", opening),
            (f"loading a domain of {megabytes:.1f} MB", loading),
        ):
            title = f"{subject.title}, {what} {N_TIMES} times"
            yield Contest("bank", title, _name(numbers[0]), calls)


def _name(n: int) -> str:
    return f"{n:,} domains"


def _filled(subject: Subject, path: Path, n: int) -> Bank:
    """A bank of `n` domains: one under many names."""
    bank = Bank.create(path, subject.backbone)
    bank.add("domain-0", subject.domain(None).eval())
    card, blob = bank._store.manifest.domains["domain-0"].card, bank._store.read("domain-0").blob
    for k in range(1, n):
        bank._store.add(f"domain-{k}", card, blob)
    return Bank.open(path)


def _repeated(call: Call) -> Call:
    def run() -> None:
        for _ in range(N_TIMES):
            call()

    return run
