"""Two processes train what one trains: equal numbers on both, those of one within rounding."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onetrunk.errors import TrainingError
from onetrunk.training import distributed
from onetrunk.training.distributed import World, check_batch, join, world

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_processes_train_what_one_does(tmp_path):
    out = tmp_path / "numbers"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr",
                "127.0.0.1", "--nproc-per-node", "2"]  # fmt: skip
    ran = subprocess.run(
        [*torchrun, str(SCRIPT), str(out)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    first, second = load_file(f"{out}.0"), load_file(f"{out}.1")
    alone = runpy.run_path(str(SCRIPT))["trained"]()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)


def test_rows_are_dealt_out_in_turn_and_every_row_once():
    batch = torch.arange(6)
    shares = [World(rank, 3).rows(batch).tolist() for rank in range(3)]
    assert shares == [[0, 3], [1, 4], [2, 5]]
    assert world() == World(0, 1)


def test_a_batch_that_does_not_deal_out_evenly_is_refused():
    check_batch(8, 4)
    with pytest.raises(TrainingError, match=r"batch_size=7 on 2 processes.*e\.g\. batch_size=8"):
        check_batch(7, 2)


@pytest.fixture
def torchrun_with_a_gpu(monkeypatch):
    """The second of two processes, on a machine with one GPU; what it joins."""
    joined = []
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed.distributed, "init_process_group", joined.append)
    monkeypatch.setattr(distributed.distributed, "destroy_process_group", lambda: None)
    return joined


def test_processes_that_train_on_the_cpu_leave_a_gpu_alone(torchrun_with_a_gpu):
    with join("cpu"):
        assert torchrun_with_a_gpu == ["gloo"]


def test_a_process_without_a_gpu_of_its_own_is_told_what_to_do(torchrun_with_a_gpu):
    told = r"process 1 .* no GPU of its own: there are 1.*--nproc-per-node 1, or .*--device cpu"
    with pytest.raises(TrainingError, match=told), join():
        pass
    assert not torchrun_with_a_gpu
