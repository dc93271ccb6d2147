"""A training that was stopped goes on bit for bit: after every step, by `break`, kill or Ctrl-C."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import onetrunk as ot
from onetrunk.core.domain import delta
from onetrunk.training.randomness import uninterrupted

N_STEPS, N_KILLS = 12, 20
OPTIMIZERS = ("momentum", "nesterov", "adamw")


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    theirs = delta(expected)
    for name, tensor in delta(found).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def whole(training: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """optimizer -> (network, records, bytes of the last checkpoint) of a run left in peace."""
    found = {}
    for optimizer in OPTIMIZERS:
        checkpoint = tmp_path_factory.mktemp("whole") / "run.safetensors"
        training.run(optimizer, checkpoint, stop_after=N_STEPS, every_s=1e9)
        model, records = training.run(optimizer)
        found[optimizer] = (model, records, checkpoint.read_bytes())
    return found


def test_the_training_would_show_a_wrong_resume(
    whole: dict[str, Any], training: SimpleNamespace
) -> None:
    last_best = []
    for model, records, _ in whole.values():
        assert [step.step for step in records] == list(range(1, N_STEPS + 1))
        assert [step.epoch for step in records] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
        assert [step.val_accuracy is not None for step in records] == [False, False, True] * 4
        last_best.append([step.step for step in records if step.best][-1])
        fresh = delta(training.model())
        moved = [name for name, t in delta(model).items() if not torch.equal(t, fresh[name])]
        assert len(moved) == len(fresh)
    assert min(last_best) < N_STEPS  # the best network is not simply the last


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_after_any_step_it_goes_on_bit_for_bit(
    optimizer: str, whole: dict[str, Any], training: SimpleNamespace, tmp_path: Path
) -> None:
    model, records, last_checkpoint = whole[optimizer]
    for stop_after in range(1, N_STEPS + 1):
        checkpoint = tmp_path / f"{stop_after}.safetensors"
        _, first = training.run(optimizer, checkpoint, stop_after=stop_after, every_s=1e9)
        assert first == records[:stop_after]
        if stop_after < N_STEPS:
            _, rest = training.run(optimizer, checkpoint, stop_after=N_STEPS, every_s=1e9)
            assert rest == records[stop_after:]
        # network, best network, optimizer and best accuracy after the last step
        assert checkpoint.read_bytes() == last_checkpoint
        resumed, none_left = training.run(optimizer, checkpoint)
        assert none_left == []
        assert_same(resumed, model)


def test_stopped_after_every_step_it_goes_on_bit_for_bit(
    whole: dict[str, Any], training: SimpleNamespace, tmp_path: Path
) -> None:
    model, records, _ = whole["adamw"]
    found = []
    for stop_after in range(1, N_STEPS + 1):
        resumed, more = training.run("adamw", tmp_path / "run", stop_after=stop_after)
        found += more
    assert found == records
    resumed, _ = training.run("adamw", tmp_path / "run")
    assert_same(resumed, model)


def test_an_error_of_the_callers_own_leaves_a_checkpoint(
    whole: dict[str, Any], training: SimpleNamespace, tmp_path: Path
) -> None:
    def caller() -> None:
        for step in ot.fit(
            training.model(),
            training.images(25, seed=0),
            training.recipe("adamw"),
            val=training.images(12, seed=2, noise=140.0),
            checkpoint=tmp_path / "run",
            device="cpu",
        ):
            if step.step == 5:
                raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError):
        caller()
    model, rest = training.run("adamw", tmp_path / "run")
    assert rest == whole["adamw"][1][5:]
    assert_same(model, whole["adamw"][0])


# SIGKILL


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    script = str(Path(__file__).parent / "one_training.py")
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def attempt(
    forks: subprocess.Popen[str], optimizer: str, folder: Path, kill_after_s: float | None
) -> float:
    """One child, killed after `kill_after_s` unless it is done; how long it lived."""
    assert forks.stdin is not None and forks.stdout is not None
    forks.stdin.write(f"{optimizer} {folder / 'run.safetensors'} {folder / 'out'}\n")
    forks.stdin.flush()
    number, started = int(forks.stdout.readline()), time.monotonic()
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        with suppress(ProcessLookupError):  # it was done
            os.kill(number, signal.SIGKILL)
    assert forks.stdout.readline() == "done\n"
    return time.monotonic() - started


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(
    forks: subprocess.Popen[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    rng = random.Random(11)
    kills = resumed_in_the_middle = 0
    lifetime_s = 1.0
    for turn in range(1000):
        optimizer = OPTIMIZERS[turn % 3]
        folder = tmp_path / str(turn)
        folder.mkdir()
        if turn < 3:
            lifetime_s = attempt(forks, optimizer, folder, None)
        while not (folder / "out").exists():
            last = kills >= N_KILLS
            attempt(forks, optimizer, folder, None if last else rng.uniform(0, lifetime_s))
            kills += not (folder / "out").exists()
        model, records, _ = whole[optimizer]
        with safe_open(folder / "out", "pt") as found:
            steps = found.metadata()["steps"].split()
            resumed_in_the_middle += 0 < len(steps) < N_STEPS
            for name, tensor in delta(model).items():
                assert torch.equal(found.get_tensor(name), tensor), (turn, name)
        if kills >= N_KILLS and turn >= 2:
            break
    assert resumed_in_the_middle > 0
    assert len(records) == N_STEPS


# Ctrl-C


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt also where a shell started the tests in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("in_training", "call", "n_done"), [(False, 1, 0), (True, 5, 5), (False, 3, 6)]
)
def test_ctrl_c_inside_a_step_or_a_validation_loses_nothing(
    in_training: bool,
    call: int,
    n_done: int,
    whole: dict[str, Any],
    training: SimpleNamespace,
    tmp_path: Path,
) -> None:
    calls = []

    def press(module: nn.Module, _args: object) -> None:
        calls.extend([True] * (module.training == in_training))
        if len(calls) == call:
            calls.append(True)
            signal.raise_signal(signal.SIGINT)

    def train(model: nn.Module) -> list[Any]:
        found = []
        for step in ot.fit(
            model,
            training.images(25, seed=0),
            training.recipe("adamw"),
            val=training.images(12, seed=2, noise=140.0),
            checkpoint=tmp_path / "run",
            device="cpu",
        ):
            found.append(step)
        return found

    handler, model = signal.getsignal(signal.SIGINT), training.model()
    model.register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        train(model)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any(module.training for module in model.modules())

    resumed = training.model()
    # a step is finished first; a validation is done again, before the next epoch
    assert train(resumed) == whole["adamw"][1][n_done:]
    assert_same(resumed, whole["adamw"][0])


def test_a_signal_waits_for_the_end_of_the_block() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached == [True]
    with uninterrupted():
        pass


def test_another_thread_leaves_the_signals_alone() -> None:
    seen: list[Any] = []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_no_thread_is_left_behind(training: SimpleNamespace, tmp_path: Path) -> None:
    def ours() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("onetrunk")]

    seen = []
    steps = ot.fit(training.model(), training.images(24), training.recipe("adamw"), device="cpu")
    for step in steps:
        seen.append(bool(ours()))
        if step.step == 2:
            break
    del steps
    assert seen == [True, True] and ours() == []


def test_left_early_it_keeps_the_network_of_the_last_step(
    training: SimpleNamespace, own_bits: Callable[..., Any], same: Callable[..., bool]
) -> None:
    model, last = training.model(), {}
    for step in ot.fit(model, training.images(24), training.recipe("adamw"), device="cpu"):
        last = own_bits(model)
        if step.step == 7:
            break
    assert same(own_bits(model), last)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
