"""The processes of a study."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from onetrunk.benchmark.study import _start_worker

def work():
    print(os.getpid(), flush=True)
    time.sleep(120)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker) as pool:
        pool.submit(work).result()
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks Linux about processes")
def test_a_worker_ends_with_a_study_that_is_killed(tmp_path):
    (tmp_path / "study.py").write_text(PROGRAM)
    study = subprocess.Popen(
        [sys.executable, tmp_path / "study.py"], stdout=subprocess.PIPE, text=True
    )
    with study:
        worker = int(study.stdout.readline())
        study.kill()
    try:
        assert ends(worker, within_s=30)
    finally:
        if not ends(worker, within_s=0):
            os.kill(worker, signal.SIGKILL)


STUDY = """
import os, signal, sys
from pathlib import Path
from onetrunk.benchmark import study
from onetrunk.benchmark.study import Job, _results

def work(what, ledger, folder):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "interrupt":
        raise KeyboardInterrupt  # as Ctrl-C does in every process
    return {"test_accuracy": 1.0}

if __name__ == "__main__":
    from functools import partial
    jobs = [Job(None, partial(work, what), what) for what in sys.argv[1:]]
    for job, record, failure in _results(jobs, None, Path(), 1 + 1):
        print(job.what, record, failure)
"""


def told(tmp_path, *jobs):
    (tmp_path / "study.py").write_text(STUDY)
    done = subprocess.run(
        [sys.executable, tmp_path / "study.py", *jobs], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_worker_that_is_gone_ends_its_cells_and_not_the_study(tmp_path, how):
    lines = told(tmp_path, how)
    assert lines == [
        f"{how} None {how}: not computed, as one of the processes was killed (out of memory?). Run "
        "the command again, with fewer --workers."
    ]
    assert told(tmp_path, "fine") == ["fine {'test_accuracy': 1.0} "]


def ends(pid: int, within_s: float) -> bool:
    """Whether a process is gone, or a zombie that nobody has waited for, by then."""
    until = time.monotonic() + within_s
    while True:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)
