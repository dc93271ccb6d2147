"""verify and remove: what keeps a bank whole, and small."""

import sys
from typing import Annotated

import typer

from ...errors import BankError
from ..console import Screen, counted
from ..options import AsJson, BankPath, Domain
from ..values import open_bank


def verify(bank: BankPath, as_json: AsJson = False) -> None:
    """Read every byte of a bank: hashes, domains as networks, the backbone's fingerprint.

    Example: onetrunk verify garden.bank
    """
    screen = Screen(as_json)
    found = open_bank(bank).verify()
    screen.finish(
        {
            "ok": found.ok,
            "domains": found.n_domains,
            "fingerprint": found.fingerprint,
            "problems": list(found.problems),
            "remarks": list(found.remarks),
        }
    )
    for line in (*found.problems, *found.remarks):
        screen.say(f"  {line}")
    if not found.ok:
        raise BankError(
            f"bank {bank} has {len(found.problems)} problem(s); the first: {found.problems[0]}"
        )
    screen.say(
        f"{bank}: {counted(found.n_domains, 'domain')} whole, backbone {found.fingerprint[:12]}"
    )


def remove(
    bank: BankPath,
    domain: Domain,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a domain and free its space; the others are not touched.

    Example: onetrunk remove garden.bank flowers --yes
    """
    screen = Screen(as_json)
    opened = open_bank(bank)
    if domain in opened.domains and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("removing cannot be undone: say --yes", param_hint="--yes")
        typer.confirm(f"Remove {domain!r} from {bank} for good?", abort=True, err=True)
    opened.remove(domain)
    screen.say(f"{bank}: {domain} removed, {counted(len(opened.domains), 'domain')} left")
    screen.finish({"removed": domain, "domains": list(opened.domains)})
