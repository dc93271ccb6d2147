"""The names of domains: 1-64 characters of a-z 0-9 _ -, the first a letter or a digit.

So narrow an alphabet has no look-alikes, no letter case and no separators, and
a name means the same on every file system, in a URL and on a command line. (A bank's files are
called by their hash all the same; only a training under way is a file of its domain's name.)
"""

import re
from collections.abc import Collection

from onetrunk.errors import BankError

RULE = "1-64 characters of a-z 0-9 _ -, the first a letter or a digit"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_N_SHOWN = 20


def is_name(name: object) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: object) -> None:
    """Refuses what is not a domain's name, and proposes the name that was probably meant.

    >>> check_name("Flowers 102")
    Traceback (most recent call last):
    onetrunk.errors.BankError: 'Flowers 102' is no name for a domain: names are 1-64 characters of \
a-z 0-9 _ -, the first a letter or a digit. Use 'flowers-102'.
    """
    if is_name(name):
        return
    proposal = suggest(name) if isinstance(name, str) else ""
    remedy = f" Use {proposal!r}." if proposal else ""
    raise BankError(f"{_shown(name)} is no name for a domain: names are {RULE}.{remedy}")


def suggest(text: str) -> str:
    """The domain name nearest to `text`; empty where nothing of it can be kept.

    >>> suggest("Straßen-Schilder (Été)")
    'strassen-schilder-ete'
    """
    import unicodedata  # only mistakes need it

    letters = unicodedata.normalize("NFKD", text[:1000]).casefold()
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return re.sub(r"[^a-z0-9_]+", "-", plain).lstrip("_-")[:64].rstrip("_-")


def unknown_name(name: str, known: Collection[str]) -> str:
    """The end of the message that says that `name` is none of the `known` ones.

    >>> unknown_name("flwers", ["flowers", "signs"])
    "no domain 'flwers'. Did you mean 'flowers'? It holds flowers, signs."
    """
    if not known:
        return f"no domain {name!r}: it is empty. Add one first."
    import difflib  # 6 ms, and only mistakes need it

    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    names = [*close, *(other for other in sorted(known) if other not in close)]
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return f"no domain {name!r}.{hint} It holds {', '.join(names[:_N_SHOWN])}{more}."


def _shown(name: object) -> str:
    """`repr`, cut where someone passed a novel."""
    if not isinstance(name, str):
        return f"a value of type {type(name).__name__}"
    return repr(name) if len(name) <= 80 else f"{name[:60]!r}... ({len(name)} characters)"
