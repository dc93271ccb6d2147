"""A bank on the Hugging Face Hub: push one up, pull one down, through huggingface_hub only.

In the repository stand `bank.json`, `blobs/<sha256>.safetensors` and a generated model card. A pull
trusts nothing: names are checked before a byte is fetched, only the files that the manifest lists
are fetched, each one's size and hash are compared, every domain is built, and only then does the
folder get its name. huggingface_hub is imported at the first call, never with onetrunk.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import BankError, DamagedError, OnetrunkError
from ..files import DISK, PathLike, read_checked, reason, write_atomically
from .bank import Bank, Domains
from .folder import BLOBS, MANIFEST, MissingBlobError, plain_path
from .manifest import MAX_BYTES, Manifest, decode, encode
from .store import Store

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

README = "README.md"
_BLOB_NAME = re.compile(r"blobs/[0-9a-f]{64}\.safetensors")
_MAX_TRIES = 5


def push(
    bank: Bank,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads one generation of `bank`, whole, as one commit; returns the repository's address.

    The repository is created where it is not there. Files of removed domains are deleted from it,
    and its README.md is written anew.

    Args:
        repo_id: `owner/name`.
        private: of a repository that is created: whether others may not see it.
        token: of an account that may write there; by default the one of `hf auth login`.
        revision: a branch, created where it is not there; by default the main one.
        message: the commit's; by default it names the generation.
        endpoint: the Hub's address; by default HF_ENDPOINT, else huggingface.co.

    Raises:
        BankError: where there is no network, no access, or the Hub refuses.
        DamagedError: where a file of the bank is damaged; nothing is uploaded then.
    """
    doing = f"push to {repo_id}"
    with _explained(doing), _folder_in(Path(tempfile.gettempdir())) as folder:
        manifest = _stage(Store.open(bank.path), folder)
        write_atomically(folder / README, _model_card(repo_id, bank, manifest).encode())
        api = _api(token, endpoint)
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.repo_info(repo_id, revision=revision)
        # upload_folder would cut a large bank into several commits, each but the last no whole bank
        api.create_commit(
            repo_id,
            _changes(folder, {file.rfilename for file in info.siblings or ()}),
            commit_message=message
            or f"Bank of {len(manifest.domains)} domains, generation {manifest.generation}",
            revision=revision,
            parent_commit=info.sha,
        )
    return url


def pull(
    repo_id: str,
    path: PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    backbone: nn.Module | None = None,
    endpoint: str | None = None,
) -> Bank:
    """Downloads the bank in `repo_id` to the new or empty folder `path`; it is checked first.

    Args:
        revision: a branch, tag or commit; by default the main branch.
        token: of an account that may read there; by default the one of `hf auth login`.
        backbone: as for `Bank.open`; with it, the domains of a bank over a user's own module are
            built and checked as well.
        endpoint: the Hub's address; by default HF_ENDPOINT, else huggingface.co.

    Raises:
        BankError: where there is no network, no access, no bank, or `path` is occupied.
        DamagedError: where what is there is not a bank as it was written; `path` is then as it was.
    """
    target = plain_path(path)
    _refuse_occupied(target)
    with _explained(f"pull {repo_id}"), _folder_in(target.parent) as folder:
        whole = folder / "bank"
        _download(_api(token, endpoint), repo_id, revision, folder / "download", whole)
        _refuse_damaged(repo_id, whole, backbone)
        os.replace(whole, target)
        DISK.sync_folder(target.parent)
    return Bank.open(target, backbone)


def _stage(store: Store, folder: Path) -> Manifest:
    """Copies one generation into `folder`, hashes checked."""
    (folder / BLOBS).mkdir()
    for _ in range(_MAX_TRIES):
        manifest = store.manifest
        try:
            for digest, size in manifest.blobs().items():
                data = store.read_blob(digest, size)
                write_atomically(folder / BLOBS / f"{digest}.safetensors", data)
        except MissingBlobError:
            if store.manifest == manifest:
                raise
            continue  # a writer was faster: its generation instead
        wanted = {f"{digest}.safetensors" for digest in manifest.blobs()}
        for file in (folder / BLOBS).iterdir():
            if file.name not in wanted:
                file.unlink()
        write_atomically(folder / MANIFEST, encode(manifest))
        return manifest
    raise BankError(
        f"bank {store.path} changes all the time. Push it when its writers are at rest."
    )


def _changes(folder: Path, there: set[str]) -> "list[CommitOperationAdd | CommitOperationDelete]":
    """What makes the repository hold the staged bank, and no other blob."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    here = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.*")}
    gone = sorted(name for name in there - here.keys() if name.startswith(f"{BLOBS}/"))
    added = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in here.items()
    ]
    return [CommitOperationDelete(path_in_repo=name) for name in gone] + added


def _download(
    api: "HfApi", repo_id: str, revision: str | None, download: Path, whole: Path
) -> None:
    """Fetches the manifest and what it lists into `download`; moves what is whole to `whole`."""
    info = api.repo_info(repo_id, revision=revision)
    names = {file.rfilename for file in info.siblings or ()}
    _refuse_odd_names(repo_id, names)
    commit = str(info.sha)
    _fetch(api, repo_id, commit, [MANIFEST], download)
    data = _read(repo_id, download / MANIFEST, limit=MAX_BYTES)
    sizes = decode(data, f"{MANIFEST} of {repo_id}").blobs()
    wanted = {f"{BLOBS}/{digest}.safetensors": digest for digest in sizes}
    found = {name for name in names if name.startswith(f"{BLOBS}/")}
    if extra := sorted(found - wanted.keys()):
        raise DamagedError(
            f"{repo_id} has a file that its manifest does not list, {extra[0]}: it is no bank as "
            "push writes it. Ask its owner to push it again."
        )
    if missing := sorted(wanted.keys() - found):
        raise DamagedError(f"{repo_id} lacks {missing[0]}. Ask its owner to push it again.")
    if wanted:
        _fetch(api, repo_id, commit, sorted(wanted), download)
    (whole / BLOBS).mkdir(parents=True)
    for name, digest in wanted.items():
        blob = _read(repo_id, download / name, size=sizes[digest], sha256=digest)
        write_atomically(whole / name, blob)
        (download / name).unlink()
    write_atomically(whole / MANIFEST, data)


def _read(repo_id: str, file: Path, **expected: Any) -> bytes:
    try:
        return read_checked(file, **expected)
    except DamagedError as error:
        found = str(error).replace(str(file), file.name)
        raise DamagedError(
            f"{repo_id}: {found.removesuffix(' Restore it from a copy.')} "
            "Ask its owner to push it again."
        ) from None


def _fetch(api: "HfApi", repo_id: str, commit: str, names: list[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(
        repo_id,
        revision=commit,
        local_dir=folder,
        allow_patterns=names,
        token=api.token,
        endpoint=api.endpoint,
        max_workers=4,
    )


def _refuse_odd_names(repo_id: str, names: set[str]) -> None:
    if MANIFEST not in names:
        raise BankError(
            f"{repo_id} holds no bank (no {MANIFEST}). Check the name and the revision."
        )
    for name in sorted(names):
        parts = name.split("/")
        if ".." in parts or "" in parts or "\\" in name or "\0" in name or ":" in name:
            raise DamagedError(
                f"{repo_id} has a file called {name[:80]!r}, which leads out of its folder. "
                "Nothing was fetched; do not use this repository."
            )
        if parts[0] == BLOBS and not _BLOB_NAME.fullmatch(name):
            raise DamagedError(
                f"{repo_id} has {name[:80]!r} among its blobs, which is no blob's name. "
                "Nothing was fetched; ask its owner to push it again."
            )


def _refuse_damaged(repo_id: str, whole: Path, backbone: nn.Module | None) -> None:
    found = Bank.open(whole, backbone).verify()
    if not found.ok:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        problem = found.problems[0].replace(str(whole), repo_id)
        raise DamagedError(f"{repo_id} is not whole: {problem}{more}. Nothing was kept.")


def _refuse_occupied(target: Path) -> None:
    try:
        occupied = target.is_symlink() or (target.exists() and any(target.iterdir()))
    except OSError:
        occupied = True
    if occupied:
        raise BankError(f"cannot pull to {str(target)!r}: something is there. Use a new path.")


def _api(token: str | None, endpoint: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT"), token=token)


@contextmanager
def _folder_in(parent: Path) -> Iterator[Path]:
    """A temporary folder that is gone afterwards, whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".onetrunk-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """What huggingface_hub raises, as one line that says what to do."""
    try:
        yield
    except OnetrunkError:
        raise
    except Exception as error:
        raise BankError(f"cannot {doing}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    chain = [error, error.__cause__, error.__context__]
    kinds = {base.__name__ for link in chain for base in type(link).__mro__}
    told = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated. Ask for access on its page, and log in (hf auth login)."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private. Check the name, and log in."
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision. Leave it out for the main branch."
    if isinstance(error, errors.HFValidationError):
        return f"{told}. A repository is called owner/name."
    response = getattr(error, "response", None)
    if response is not None:
        hint = "Log in with an account that may do this (hf auth login)."
        status = response.status_code
        return (
            f"the Hub answers {status} ({told}). {hint if status in (401, 403) else 'Try later.'}"
        )
    if kinds & {"TransportError", "ConnectionError", "TimeoutException", "OfflineModeIsEnabled"}:
        return "the Hub cannot be reached. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
    if isinstance(error, OSError) and error.errno is not None:
        return reason(error)
    return f"{type(error).__name__}: {told}."


def _model_card(repo_id: str, bank: Bank, manifest: Manifest) -> str:
    """README.md: what the repository holds and how to use it."""
    cards = list(Domains(manifest, bank.path).values())
    rows = "\n".join(
        f"| {card.name} | {_cell(card.family)} | {len(card.classes)}: {_classes(card.classes)} "
        f"| {card.numbers:,} | {card.size / 1e6:.2f} MB | {_metrics(card.metrics)} |"
        for card in cards
    )
    first = cards[0].name if cards else "NAME"
    return f"""---
library_name: onetrunk
pipeline_tag: image-classification
tags:
- onetrunk
- multi-domain
- residual-adapters
---

# {repo_id.rpartition("/")[2]}

One frozen backbone, `{_cell(manifest.backbone["spec"])}`, and over it {len(cards)} visual
domain{"s" * (len(cards) != 1)}, kept by [onetrunk](https://pypi.org/project/onetrunk/).

| domain | family | classes | numbers | size | metrics |
|---|---|---|---:|---:|---|
{rows}

```python
import onetrunk as ot

bank = ot.Bank.pull("{repo_id}", "{repo_id.rpartition("/")[2]}.bank")
model = bank.load("{first}")  # an ordinary torch module, in eval mode
predictions = ot.predict(model, "photo.jpg")
```
"""


def _classes(classes: tuple[str, ...], n_shown: int = 6) -> str:
    shown = ", ".join(_cell(name) for name in classes[:n_shown])
    return shown + (", ..." if len(classes) > n_shown else "")


def _metrics(metrics: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{_cell(key)} {value:.4g}" if isinstance(value, float) else f"{_cell(key)} {_cell(value)}"
        for key, value in metrics.items()
        if not isinstance(value, dict | list)
    )


def _cell(value: object) -> str:
    """Text that cannot break out of a table's cell."""
    plain = re.sub(r"[\s`<>\[\]|\\]+", " ", str(value)).strip()
    return plain[:60] + ("..." if len(plain) > 60 else "")
