"""Several processes on one bank: no change is lost, no reader sees half of one.

The processes are forked in a process of their own (`python test_store_concurrency.py WHAT FOLDER`):
a fork of one that has threads (xdist, torch) could hang.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from onetrunk.bank.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
BACKBONE = {"spec": "resnet26(width=0.5)", "fingerprint": "3f9c"}
N_WRITERS, N_ADDS = 8, 12
N_READERS, N_CHANGES = 3, 150


def fork(work: Callable[[], Any], result: Path) -> int:
    """Runs `work` in a child that writes what it returns to the file `result`."""
    child = os.fork()
    if child == 0:
        try:
            result.write_text(json.dumps(work()))
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
        finally:
            os._exit(1)
    return child


def wait_for(children: list[int]) -> None:
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)


# Eight writers


def add_many(path: Path, writer: int) -> list[int]:
    store = Store.open(path, wait_s=120)
    return [
        store.add(f"w{writer}-{i}", {"i": i}, b"%d %d" % (writer, i)).generation
        for i in range(N_ADDS)
    ]


def writers(folder: Path) -> list[list[int]]:
    path = Store.create(folder / "garden.bank", BACKBONE).path
    files = [folder / f"{i}.json" for i in range(N_WRITERS)]
    wait_for([fork(lambda i=i: add_many(path, i), file) for i, file in enumerate(files)])
    return [json.loads(file.read_text()) for file in files]


# One writer, three readers


def step(generation: int) -> tuple[dict[str, Any], bytes]:
    """The card and the bytes of the domain that generation `generation` brought."""
    return {"generation": generation}, b"%d," % generation * 500


def names_at(generation: int) -> set[str]:
    """Generation 2 adds `x`, and the later ones in turn rename it and replace it."""
    return set() if generation == 1 else {"x" if generation // 2 % 2 else "y"}


def change_many(path: Path) -> int:
    store = Store.open(path)
    store.add("x", *step(2))
    for generation in range(3, N_CHANGES + 3):
        [name] = store.manifest.domains
        if generation % 2:
            assert store.replace(name, *step(generation)).generation == generation
        else:
            assert store.rename(name, "y" if name == "x" else "x").generation == generation
    store.remove(next(iter(store.manifest.domains)))
    return store.manifest.generation


def read_many(path: Path) -> dict[str, int]:
    store, seen, n_reads = Store.open(path), 1, 0
    while (manifest := store.manifest).generation < N_CHANGES + 3:
        assert manifest.generation >= seen, "a generation went back"
        seen = manifest.generation
        assert set(manifest.domains) == names_at(seen), f"torn generation {seen}"
        for entry in manifest.domains.values():
            assert entry.card["generation"] in (seen, seen - 1)
        n_reads += read_either(store)
    return {"reads": n_reads, "last": manifest.generation}


def read_either(store: Store) -> int:
    """Reads the domain by whichever name it has by now; returns how often that succeeded."""
    n_reads = 0
    for name in ("x", "y"):
        try:
            contents = store.read(name)
        except ValueError as error:
            assert "has no domain" in str(error), str(error)  # renamed meanwhile
            continue
        card, blob = step(contents.entry.card["generation"])
        assert (contents.entry.card, contents.blob) == (card, blob)
        n_reads += 1
    return n_reads


def readers(folder: Path) -> list[Any]:
    path = Store.create(folder / "garden.bank", BACKBONE).path
    files = [folder / f"{i}.json" for i in range(N_READERS + 1)]
    children = [fork(lambda: read_many(path), file) for file in files[1:]]
    children.append(fork(lambda: change_many(path), files[0]))
    wait_for(children)
    return [json.loads(file.read_text()) for file in files]


# A writer that is stopped, then killed, while it holds the lock


def second_writer(folder: Path) -> list[str]:
    store = Store.create(folder / "garden.bank", BACKBONE, wait_s=0.2)
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        from onetrunk.files import DISK

        with DISK.lock(store.path / "bank.lock", 5):
            os.write(writes, b".")
            signal.pause()
    os.read(reads, 1)
    said = []
    try:
        store.add("a", {}, b"1")
    except ValueError as error:
        said.append(str(error))
    assert store.manifest.generation == 1  # a reader does not wait
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    store.add("a", {}, b"1")
    return said


# The tests


def run(what: str, folder: Path) -> Any:
    command = [sys.executable, __file__, what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_eight_writers_lose_no_change_and_never_share_a_generation(tmp_path):
    generations = run("writers", tmp_path)
    assert all(own == sorted(own) for own in generations)
    assert sorted(chain.from_iterable(generations)) == list(range(2, N_WRITERS * N_ADDS + 2))
    store = Store.open(tmp_path / "garden.bank")
    assert store.verify() == []
    for writer in range(N_WRITERS):
        for i in range(N_ADDS):
            assert store.read(f"w{writer}-{i}").blob == b"%d %d" % (writer, i)


def test_readers_see_each_generation_whole_while_a_writer_works(tmp_path):
    last, *seen = run("readers", tmp_path)
    assert last == N_CHANGES + 3
    assert [reader["last"] for reader in seen] == [last] * N_READERS
    assert Store.open(tmp_path / "garden.bank").verify() == []


def test_a_second_writer_is_told_and_the_death_of_the_first_frees_the_lock(tmp_path):
    [said] = run("second_writer", tmp_path)
    assert "cannot add domain 'a' to bank" in said
    assert "another process is changing it (waited 0.2 s). Ask again when it is done" in said


if __name__ == "__main__":
    work = {"writers": writers, "readers": readers, "second_writer": second_writer}[sys.argv[1]]
    sys.stdout.write(json.dumps(work(Path(sys.argv[2]))))
