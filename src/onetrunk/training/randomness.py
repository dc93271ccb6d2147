"""Random numbers that are a function of a seed, and Ctrl-C that waits for the end of a step.

Both make a training step a pure function of what is written in a checkpoint: dropout and the user's
own random transforms draw from the seed of their step, whatever anybody else draws in between.
"""

import hashlib
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

CPU = torch.device("cpu")
_TURN = threading.RLock()  # one thread may enter several times


def seed_of(seed: int, purpose: str, number: int) -> int:
    """63 bits that are unrelated for any two different (seed, purpose, number).

    >>> seed_of(0, "order", 1) == seed_of(0, "dropout", 1)
    False
    """
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def own_draws(device: torch.device = CPU) -> Iterator[None]:
    """Whatever is drawn or seeded inside (torch, numpy, random), the caller's numbers go on as if
    nothing were. Of several GPUs, the one of `device`; no other is touched.

    The generators are the process's, so threads take turns: one is inside at a time.
    """
    with _TURN, _restored(device):
        yield


@contextmanager
def _restored(device: torch.device) -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with ExitStack() as stack:
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, numpy)
        stack.callback(torch.set_rng_state, cpu)
        if device.type == "cuda":
            stack.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
        elif device.type == "mps":
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield


def reseed(seed: int, device: torch.device = CPU) -> None:
    """Seeds torch's generators of the CPU and of `device`, numpy's and Python's.

    Not `torch.manual_seed`: that reaches every GPU of the machine.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back until the block is done; then they do what they always do."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    held: list[int] = []
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    # None: installed by C code, and Python could not put it back
    known = {which: handler for which, handler in before.items() if handler is not None}
    try:
        for which in known:
            signal.signal(which, lambda number, _frame: held.append(number))
        yield
    finally:
        for which, handler in known.items():
            signal.signal(which, handler)
        for number in dict.fromkeys(held):
            signal.raise_signal(number)


class Stream:
    """Random numbers of one user among several: torch's, which go on where they stopped.

    >>> ours, theirs = Stream(1), Stream(1)
    >>> def drawn(stream):
    ...     with stream.drawing():
    ...         return float(torch.rand(()))
    >>> first, second = drawn(ours), drawn(ours)
    >>> [drawn(theirs), drawn(theirs)] == [first, second], first == second
    (True, False)
    """

    def __init__(self, seed: int, device: torch.device = CPU) -> None:
        self.seed, self.device = seed, device
        self._states: list[torch.Tensor] = []

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While it is entered, torch draws from here; then as if nothing were."""
        with own_draws(self.device):
            if self._states:
                _set_states(self._states, self.device)
            else:
                reseed(self.seed, self.device)
            yield
            self._states = _states(self.device)


def _states(device: torch.device) -> list[torch.Tensor]:
    of_device = {"cuda": lambda: [torch.cuda.get_rng_state(device)],
                 "mps": lambda: [torch.mps.get_rng_state()]}  # fmt: skip
    return [torch.get_rng_state(), *of_device.get(device.type, list)()]


def _set_states(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])
