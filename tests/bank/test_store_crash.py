"""Crashes: SIGKILL at any moment, power loss at any moment, an error at any operation.

After each of them the bank is exactly the old one or exactly the new one, every hash right, and
the next writer leaves no file too many. `python test_store_crash.py N SEED FOLDER` kills N writers.
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from onetrunk.bank.store import Manifest, Store
from onetrunk.errors import BankError
from onetrunk.files import Disk, Facts

BACKBONE = {"spec": "resnet26(width=0.5)", "fingerprint": "3f9c"}
NAMES = ("a", "b", "c", "d")
Model = dict[str, tuple[dict[str, Any], bytes]]
Change = tuple[str, tuple[Any, ...]]

# SIGKILL


def next_change(rng: random.Random, model: Model) -> Change:
    """A random request that the bank of `model` grants; its card and blob are unlike all others."""
    free = [name for name in NAMES if name not in model]
    held = sorted(model)
    kind = rng.choice(["add"] * bool(free) + ["replace", "remove"] * bool(held))
    if free and held and rng.random() < 0.2:
        return "rename", (rng.choice(held), rng.choice(free))
    if kind == "remove":
        return kind, (rng.choice(held),)
    name = rng.choice(free if kind == "add" else held)
    return kind, (name, {"key": rng.getrandbits(60)}, rng.randbytes(rng.randrange(20_000)))


def changed(model: Model, change: Change) -> Model:
    kind, (name, *rest) = change
    others = {other: value for other, value in model.items() if other != name}
    if kind == "remove":
        return others
    if kind == "rename":
        return {**others, rest[0]: model[name]}
    return {**others, name: (rest[0], rest[1])}


def change_until_killed(path: Path, model: Model, seed: int, done: int) -> None:
    """Changes the bank for ever; writes one byte to the pipe `done` after each change."""
    rng, store = random.Random(seed), Store.open(path)
    while True:
        change = next_change(rng, model)
        getattr(store, change[0])(*change[1])
        model = changed(model, change)
        os.write(done, b".")


def models_around(model: Model, seed: int, n_done: int) -> tuple[Model, Model]:
    """What the bank holds after `n_done` changes, and after one more."""
    rng = random.Random(seed)
    for _ in range(n_done):
        model = changed(model, next_change(rng, model))
    return model, changed(model, next_change(rng, model))


def contents(store: Store) -> Model:
    read = {name: store.read(name) for name in store.manifest.domains}
    return {name: (found.entry.card, found.blob) for name, found in read.items()}


def tidy(store: Store) -> None:
    if "mine" in store.manifest.domains:
        store.remove("mine")
    else:
        store.add("mine", {}, b"mine")


def kill_one_writer(path: Path, model: Model, seed: int, delay_s: float) -> tuple[Model, int]:
    """Returns what the bank holds after the kill, which is one of two things, and the changes."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            change_until_killed(path, model, seed, writes)
        finally:
            os._exit(1)
    os.close(writes)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer died of an error"
    n_done = len(os.read(reads, 1 << 20))
    os.close(reads)
    store = Store.open(path)
    found = contents(store)
    assert found in models_around(model, seed, n_done), f"torn after {n_done} changes"
    assert not [x for x in store.verify() if x.kind != "leftover"], store.verify()
    return found, n_done


def kill_writers(n_kills: int, seed: int, folder: Path) -> dict[str, int]:
    rng = random.Random(seed)
    store = Store.create(folder / "garden.bank", BACKBONE, b"weights")
    model: Model = {}
    n_changes = n_caught_at_work = 0
    for i in range(n_kills):
        child_seed, delay_s = rng.getrandbits(32), rng.uniform(0, 0.03)
        try:
            model, n_done = kill_one_writer(store.path, model, child_seed, delay_s)
        except AssertionError as error:
            raise AssertionError(f"kill {i} of seed {seed} ({child_seed=}): {error}") from error
        n_changes += n_done
        n_caught_at_work += bool(store.verify())
        tidy(store)  # the lock is free at once, and one change leaves the bank tidy
        assert store.verify() == [], f"kill {i} of seed {seed}: {store.verify()}"
        model = contents(store)
    return {"kills": n_kills, "changes": n_changes, "caught_at_work": n_caught_at_work}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_500_writers_killed_at_random_moments_leave_the_old_bank_or_the_new(tmp_path):
    # In a process of its own: a fork of one that has threads (xdist, torch) could hang.
    seed = 20180618
    command = [sys.executable, __file__, "500", str(seed), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"seed {seed}: {run.stderr[-3000:]}"
    found = json.loads(run.stdout)
    assert found["kills"] == 500
    assert found["changes"] + found["caught_at_work"] > 0


# A disk in memory, for the two kinds of failure that are simulated


class MemoryDisk(Disk):
    """The operations of a disk over two dicts; `step` sees each before it happens."""

    def __init__(self, files: dict[str, bytes], folders: set[str]) -> None:
        self.files = {path: bytearray(data) for path, data in files.items()}
        self.folders = set(folders)
        self.opened: dict[int, tuple[str, bytearray, list[int]]] = {}

    def step(self, operation: str) -> None:
        pass

    def _open(self, path: str, data: bytearray) -> int:
        fd = len(self.opened) + 1000
        self.opened[fd] = (path, data, [0])
        return fd

    def _missing(self, path: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    def create(self, path: Path) -> int:
        self.step("create")
        return self._open(str(path), self.files.setdefault(str(path), bytearray()))

    def write(self, fd: int, data: memoryview) -> int:
        self.step("write")
        self.opened[fd][1].extend(data)
        return len(data)

    def sync(self, fd: int) -> None:
        self.step("sync")

    def open(self, path: Path) -> int:
        self.step("open")
        if str(path) not in self.files:
            raise self._missing(str(path))
        return self._open(str(path), self.files[str(path)])

    def read(self, fd: int, n_bytes: int) -> bytes:
        self.step("read")
        _, data, at = self.opened[fd]
        at[0] += n_bytes
        return bytes(data[at[0] - n_bytes : at[0]])

    def close(self, fd: int) -> None:
        self.step("close")

    def facts(self, where: Path | int) -> Facts:
        self.step("facts")
        if isinstance(where, int):
            data = self.opened[where][1]
        elif str(where) in self.folders:
            return Facts("folder", 0, (0, 0, 0))
        elif str(where) in self.files:
            data = self.files[str(where)]
        else:
            raise self._missing(str(where))
        return Facts("file", len(data), (0, id(data), 0))

    def names(self, folder: Path) -> list[str]:
        self.step("names")
        if str(folder) not in self.folders:
            raise self._missing(str(folder))
        head = f"{folder}/"
        inside = [p for paths in (self.files, self.folders) for p in paths if p.startswith(head)]
        return sorted({path[len(head) :].split("/")[0] for path in inside})

    def replace(self, source: Path, target: Path) -> None:
        self.step("replace")
        self.files[str(target)] = self.files.pop(str(source))

    def unlink(self, path: Path) -> None:
        self.step("unlink")
        if self.files.pop(str(path), None) is None:
            raise self._missing(str(path))

    def make_folder(self, folder: Path) -> None:
        self.step("make_folder")
        if str(folder) in self.folders:
            raise FileExistsError(errno.EEXIST, "File exists", str(folder))
        self.folders.add(str(folder))

    def remove_folder(self, folder: Path) -> None:
        self.step("remove_folder")
        if self.names(folder):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        self.folders.remove(str(folder))

    def sync_folder(self, folder: Path) -> None:
        self.step("sync_folder")

    @contextmanager
    def lock(self, path: Path, wait_s: float) -> Iterator[None]:
        self.step("lock")
        yield


# An error at the n-th operation


class FailingDisk(MemoryDisk):
    """Fails at operation `n`, or from it on; a `short` disk takes half a write each time before."""

    def __init__(self, base: MemoryDisk, n: int, error: BaseException, persists: bool, short: bool):
        files = {path: bytes(data) for path, data in base.files.items()}
        super().__init__(files, base.folders)
        self.n_left, self.error, self.persists, self.short = n, error, persists, short
        self.failed = ""

    def step(self, operation: str) -> None:
        self.n_left -= 1
        if self.n_left == 0 or (self.persists and self.n_left < 0):
            self.failed = self.failed or operation
            raise self.error

    def write(self, fd: int, data: memoryview) -> int:
        return super().write(fd, data[: (len(data) + 1) // 2] if self.short else data)


PATH = Path("/garden.bank")
CARD = {"classes": ["daisy", "rose"]}


def base_disk() -> MemoryDisk:
    disk = MemoryDisk({}, {"/"})
    store = Store.create(PATH, BACKBONE, b"weights", disk=disk)
    store.add("a", CARD, b"a" * 50, [b"basis"])
    store.add("b", CARD, b"b" * 50, [b"basis"])
    disk.files[f"{PATH}/blobs/{'0' * 64}.safetensors"] = bytearray(b"left by a dead writer")
    return disk


REQUESTS: dict[str, Callable[[Disk], object]] = {
    "create": lambda disk: Store.create(PATH, BACKBONE, b"weights", disk=disk),
    "add": lambda disk: Store.open(PATH, disk=disk).add("c", CARD, b"c" * 50, [b"basis", b"other"]),
    "replace": lambda disk: Store.open(PATH, disk=disk).replace("a", CARD, b"c" * 50),
    "rename": lambda disk: Store.open(PATH, disk=disk).rename("a", "c"),
    "remove": lambda disk: Store.open(PATH, disk=disk).remove("a"),
}
ERRORS = {
    "ENOSPC": OSError(errno.ENOSPC, "No space left on device"),
    "EIO": OSError(errno.EIO, "Input/output error"),
    "EACCES": PermissionError(errno.EACCES, "Permission denied"),
    "EROFS": OSError(errno.EROFS, "Read-only file system"),
    "interrupt": KeyboardInterrupt(),
}


def held(disk: MemoryDisk) -> Manifest | None:
    """The generation that a healthy disk of the same contents holds, every blob hashed."""
    files = {path: bytes(data) for path, data in disk.files.items()}
    healthy = MemoryDisk(files, disk.folders)
    if f"{PATH}/bank.json" not in files:
        return None
    store = Store.open(PATH, disk=healthy)
    assert not [problem for problem in store.verify() if problem.kind != "leftover"]
    manifest = store.manifest
    store.add("next", {}, b"")
    assert store.verify() == [], "the next writer does not tidy up"
    return manifest


def check_outcome(raised: BaseException | None, found: Any, old: Any, new: Any) -> None:
    if raised is None:
        assert found == new, "silent success without the change"
    elif isinstance(raised, KeyboardInterrupt):
        assert found in (old, new)
    else:
        said = str(raised)
        assert isinstance(raised, BankError), f"{raised!r}"
        assert found == (new if "The change stands" in said else old), said
        assert "bank" in said


def check_tidy(disk: FailingDisk, base: MemoryDisk) -> None:
    """One error, and nothing new lies about (an interrupt may come when the change is made)."""
    new = disk.files.keys() - base.files.keys()
    if f"{PATH}/bank.json" in new or isinstance(disk.error, KeyboardInterrupt):
        return
    assert not new, f"left: {new}"
    assert disk.folders <= base.folders | {str(PATH)}


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
@pytest.mark.parametrize("persists", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("error_name", ERRORS)
def test_an_error_at_any_operation_leaves_the_old_bank_or_the_new(
    request_name, error_name, persists, short
):
    base = MemoryDisk({}, {"/"}) if request_name == "create" else base_disk()
    perform, error = REQUESTS[request_name], ERRORS[error_name]
    whole = FailingDisk(base, 1 << 30, error, False, short)
    perform(whole)
    old, new = held(base), held(whole)
    assert old != new
    for n in range(1, 10_000):
        disk, raised = FailingDisk(base, n, error, persists, short), None
        try:
            perform(disk)
        except BaseException as caught:
            raised = caught
        if not disk.failed:
            break
        try:
            check_outcome(raised, held(disk), old, new)
            if not persists and raised is not None and "The change stands" not in str(raised):
                check_tidy(disk, base)
        except (AssertionError, BankError) as wrong:
            pytest.fail(f"operation {n} ({disk.failed}): {wrong}")
    assert n > 20


@pytest.mark.parametrize("request_name", REQUESTS)
def test_an_interrupt_just_after_the_replacement_keeps_what_the_new_bank_needs(request_name):
    class Interrupted(FailingDisk):
        def replace(self, source: Path, target: Path) -> None:
            super().replace(source, target)
            if target.name == "bank.json":
                raise KeyboardInterrupt

    base = MemoryDisk({}, {"/"}) if request_name == "create" else base_disk()
    whole = FailingDisk(base, 0, OSError(), False, False)
    interrupted = Interrupted(base, 0, OSError(), False, False)
    REQUESTS[request_name](whole)
    with pytest.raises(KeyboardInterrupt):
        REQUESTS[request_name](interrupted)
    assert held(interrupted) in (held(base), held(whole))


def test_a_real_file_that_may_not_grow_leaves_the_old_bank(tmp_path):
    code = (
        "import resource, signal, sys; from onetrunk.bank.store import Store, BankError\n"
        "store = Store.open(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: store.add('a', {}, bytes(20_000))\n"
        "except BankError as error: print(error)\n"
    )
    pytest.importorskip("resource")
    store = Store.create(tmp_path / "garden.bank", BACKBONE)
    run = subprocess.run(
        [sys.executable, "-c", code, str(store.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in run.stdout
    assert "Nothing was changed" in run.stdout
    assert store.manifest.generation == 1
    assert store.verify() == []


# Power loss


class RecordingDisk(Disk):
    """Does everything for real, and writes down what a power loss could undo."""

    def __init__(self) -> None:
        self.trace: list[tuple[Any, ...]] = []
        self.paths: dict[int, str] = {}
        self.interrupts = False

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.paths[fd] = str(path)
        self.trace.append(("create", str(path)))
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        # In pieces, so that a loss can fall between them.
        n_taken = super().write(fd, data[: max(1, len(data) // 2)])
        self.trace.append(("write", self.paths[fd], bytes(data[:n_taken])))
        return n_taken

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.trace.append(("sync", self.paths[fd]))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.trace.append(("replace", str(source), str(target)))
        if self.interrupts and target.name == "bank.json":
            self.interrupts = False
            raise KeyboardInterrupt

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.trace.append(("unlink", str(path)))

    def make_folder(self, folder: Path) -> None:
        super().make_folder(folder)
        self.trace.append(("make_folder", str(folder)))

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self.trace.append(("sync_folder", str(folder)))


class NoFileSync(RecordingDisk):
    def sync(self, fd: int) -> None:
        pass


class NoFolderSync(RecordingDisk):
    def sync_folder(self, folder: Path) -> None:
        pass


class Volatile:
    """A disk of which only what was synced is sure to be there when the power comes back.

    Two laws for names: journalled (the unsynced changes are lost from some moment on) and the
    harsher one (each unsynced change is lost or kept by itself). An unsynced file comes back whole,
    empty, cut, or with 16-byte blocks of zeros.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.sure: dict[str, str] = {root: "folder"}  # path -> inode, or "folder"
        self.unsure: list[dict[str, str | None]] = []  # changes of names, in order
        self.now: dict[str, str] = {}
        self.data: dict[str, bytes] = {}
        self.synced: set[str] = set()
        self.n_inodes = 0

    def play(self, event: tuple[Any, ...]) -> None:
        getattr(self, f"_{event[0]}")(*event[1:])

    def _create(self, path: str) -> None:
        self.n_inodes += 1
        inode = f"inode {self.n_inodes}"
        self.now[path], self.data[inode] = inode, b""
        self.unsure.append({path: inode})

    def _write(self, path: str, data: bytes) -> None:
        self.data[self.now[path]] += data

    def _sync(self, path: str) -> None:
        self.synced.add(self.now[path])

    def _replace(self, source: str, target: str) -> None:
        self.now[target] = self.now.pop(source)
        self.unsure.append({source: None, target: self.now[target]})

    def _unlink(self, path: str) -> None:
        del self.now[path]
        self.unsure.append({path: None})

    def _make_folder(self, path: str) -> None:
        self.unsure.append({path: "folder"})

    def _sync_folder(self, folder: str) -> None:
        inside = [change for change in self.unsure if os.path.dirname(min(change)) == folder]
        for change in inside:
            self._apply(self.sure, change)
        self.unsure = [change for change in self.unsure if change not in inside]

    @staticmethod
    def _apply(names: dict[str, str], change: dict[str, str | None]) -> None:
        for path, inode in change.items():
            if inode is None:
                names.pop(path, None)
            else:
                names[path] = inode

    def after_power_loss(self, rng: random.Random) -> MemoryDisk:
        names = dict(self.sure)
        journalled, n_kept = rng.random() < 0.5, rng.randint(0, len(self.unsure))
        for i, change in enumerate(self.unsure):
            if i < n_kept if journalled else rng.random() < 0.5:
                self._apply(names, change)
        folders = {path for path, inode in names.items() if inode == "folder"}
        reachable = {p: x for p, x in names.items() if os.path.dirname(p) in folders}
        files = {p: self._left(x, rng) for p, x in reachable.items() if x != "folder"}
        return MemoryDisk(files, folders)

    def _left(self, inode: str, rng: random.Random) -> bytes:
        data = self.data[inode]
        if inode in self.synced:
            return data
        match rng.randrange(4):
            case 0:
                return data
            case 1:
                return b""
            case 2:
                return data[: rng.randint(0, len(data))]
        blocks = [data[i : i + 16] for i in range(0, len(data), 16)]
        return b"".join(rng.choice([block, bytes(len(block))]) for block in blocks)


class Step(NamedTuple):
    """A generation, the events up to the end of its request, and whether it must last then."""

    n_events: int
    manifest: Manifest | None
    lasts: bool


def record(folder: Path, disk: RecordingDisk) -> list[Step]:
    """Makes a bank and changes it, interrupted now and then just after the replacement."""
    store = Store.create(folder / "garden.bank", BACKBONE, b"weights" * 10, disk=disk)
    steps = [Step(0, None, True), Step(len(disk.trace), store.manifest, True)]
    requests: list[Callable[[], Manifest]] = [
        lambda: store.add("a", {"n": 1}, b"a" * 100),
        lambda: store.add("b", {"n": 2}, b"b" * 100, [b"basis" * 10]),
        lambda: store.replace("a", {"n": 3}, b"c" * 100, [b"basis" * 10]),
        lambda: store.replace("a", {"n": 4}, b"d" * 100, [b"basis" * 10]),
        lambda: store.rename("a", "c"),
        lambda: store.replace("b", {"n": 5}, b"e" * 100),
        lambda: store.remove("c"),
        lambda: store.add("a", {"n": 6}, b"a" * 100),
        lambda: store.remove("b"),
    ]
    for i, request in enumerate(requests):
        disk.interrupts = i in (3, 6)
        lasts = not disk.interrupts
        with suppress(KeyboardInterrupt):
            request()
        steps.append(Step(len(disk.trace), store.manifest, lasts))
    return steps


def allowed_after(n_events: int, steps: list[Step]) -> list[Manifest | None]:
    """The last generation that must last by then, and those that were made or begun since."""
    done = [i for i, step in enumerate(steps) if step.n_events <= n_events]
    first = max(i for i in done if steps[i].lasts)
    is_at_rest = steps[done[-1]].n_events == n_events
    last = done[-1] if is_at_rest else done[-1] + 1
    return [step.manifest for step in steps[first : last + 1]]


def whole_generation(path: Path, disk: MemoryDisk) -> Manifest | None:
    """The generation found after the loss; AssertionError where the bank is torn."""
    if f"{path}/bank.json" not in disk.files:
        return None
    store = Store.open(path, disk=disk)
    torn = [str(problem) for problem in store.verify() if problem.kind == "damaged"]
    assert not torn, torn
    return store.manifest


def lose_power(folder: Path, disk: RecordingDisk, n_each: int, seed: int) -> tuple[int, list[str]]:
    """Cuts the power `n_each` times after each event; returns how many states, and the torn."""
    steps = record(folder, disk)
    rng, volatile, torn = random.Random(seed), Volatile(str(folder)), []
    for n_events, event in enumerate(disk.trace, 1):
        volatile.play(event)
        allowed = allowed_after(n_events, steps)
        for i in range(n_each):
            state = volatile.after_power_loss(rng)
            try:
                found = whole_generation(folder / "garden.bank", state)
                assert found in allowed, f"generation {found and found.generation}"
            except (BankError, AssertionError) as error:
                torn.append(f"seed {seed}, event {n_events} {event[:2]}, state {i}: {error}")
    return len(disk.trace) * n_each, torn


def test_20_000_power_losses_leave_the_old_bank_or_the_new(tmp_path):
    n_states, torn = lose_power(tmp_path, RecordingDisk(), 80, seed=1806)
    assert torn == []
    assert n_states >= 20_000


@pytest.mark.parametrize("mutant", [NoFileSync, NoFolderSync])
def test_a_store_that_does_not_flush_would_be_caught(tmp_path, mutant):
    _, torn = lose_power(tmp_path, mutant(), 20, seed=1806)
    assert len(torn) > 10


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(kill_writers(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
    )
