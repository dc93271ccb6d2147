"""benchmark as a user types it: a report, the same again at once, and refusals before any work."""

import json

import numpy as np
import pytest
from PIL import Image

TINY = ("--backbone", "resnet26(width=0.125)", "--workers", 1)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """One domain, of 8 pictures a class and split."""
    root, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name, mean in (("dark", 60), ("light", 190)):
            folder = root / "shades" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                grey = np.clip(rng.normal(mean, 20, (36, 36)), 0, 255).astype(np.uint8)
                Image.fromarray(grey).save(folder / f"{number}.png")
    return root


def test_mini_writes_a_report_and_computes_nothing_twice(run, domains, tmp_path):
    words = ("benchmark", "mini", domains, "--out", tmp_path, *TINY, "--methods", "head; norm")
    first = run(*words)
    assert first.status == 0, first.err
    assert "linear probe" in first.out
    lines = (tmp_path / "cells.jsonl").read_text()
    assert run(*words).status == 0
    assert (tmp_path / "cells.jsonl").read_text() == lines
    again = run(*words)
    assert "2 cells, 2 of them done, 1 domain" in again.out
    report = run(*words, "--report-only", "--json")
    assert "--report-only" not in (tmp_path / "mini.md").read_text()
    assert json.loads(report.out)["cells"] == 2
    assert (tmp_path / "mini.html").exists()


def test_a_study_some_of_whose_cells_failed_is_reported_and_ends_with_status_1(
    run, domains, tmp_path
):
    words = ("benchmark", "mini", domains, "--out", tmp_path, *TINY)
    ran = run(*words, "--methods", "head; allocate(budget='1B')", "--json")
    assert ran.status == 1 and json.loads(ran.out)["cells"] == 1
    (failure,) = json.loads(ran.out)["left_out"]
    assert "the budget '1B' is 0 numbers" in failure
    assert f"left out: {failure}" in (tmp_path / "mini.md").read_text().replace("\\", "")


def test_transfer_has_a_cell_for_each_number_of_images(run, domains, tmp_path):
    done = run(
        "benchmark", "transfer", domains, "--out", tmp_path, *TINY, "--methods", "head",
        "--per-class", "2,all", "--seeds", "0,1", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert json.loads(done.out)["cells"] == 3  # on all images a probe is the same for any seed


def test_recorded_steps_without_a_gpu_are_told_of_cell_by_cell(run, domains, tmp_path):
    words = ("benchmark", "mini", domains, "--out", tmp_path, *TINY, "--methods", "norm")
    ran = run(*words, "--graphed")
    assert ran.status == 1 and "error: no cell could be computed; the first: " in ran.err
    assert "left out: resnet26(width=0.125) norm shades: fit(graphed=True) on cpu" in ran.err
    assert not (tmp_path / "cells.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("mini", "--methods", "parallell"), 1, "unknown method 'parallell'"),
        (("mini", "--domains", "cats"), 1, "has no domain 'cats'"),
        (("mini", "--seeds", "one"), 2, "no list of whole numbers"),
        (("mini", "--methods", " ; "), 2, "it names no method"),
        (("mini", "--seeds", ""), 2, "no list of whole numbers"),
        (("transfer", "--per-class", ","), 2, "no list of whole numbers"),
        (
            ("mini", "--backbone", "timm:resnet81", "--methods", "head"),
            1,
            "error: unknown timm mod",
        ),
        (("transfer", "--per-class", "1"), 1, "need 2 at least"),
        (
            (
                "mini",
                "--methods",
                "head",
                "--backbone",
                "resnet26(width=0.125)@a/x.safetensors",
                "--backbone",
                "resnet26(width=0.125)@b/x.safetensors",
            ),
            1,
            "a/x.safetensors and b/x.safetensors would both be resnet26(width=0.125)@x.safetensors",
        ),
        (("mini", "--report-only", "--methods", "head"), 1, "no finished cell of this study"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(
    run, domains, tmp_path, words, status, message
):
    study, *options = words
    refused = run("benchmark", study, domains, "--out", tmp_path, *TINY, *options)
    assert refused.status == status
    assert message in " ".join(refused.err.replace("│", " ").split())
    assert not list(tmp_path.glob("*.jsonl"))


def test_speed_prints_saves_and_draws_and_refuses_unknown_groups(run, tmp_path, monkeypatch):
    monkeypatch.setattr("onetrunk.benchmark.speed.memory.N_DOMAINS", (1, 4))
    words = ("benchmark", "speed", "--out", tmp_path, "--backbone", "resnet26(width=0.125)@16")
    ran = run(*words, "--only", "memory", "--json")
    assert ran.status == 0, ran.err
    records = json.loads(ran.out)["records"]
    assert [r["n_domains"] for r in records] == [1, 4]
    assert "Memory by number of domains" in (tmp_path / "speed.md").read_text()
    ran = run(*words, "--only", "latency")
    assert ran.status == 1 and "no group 'latency' in benchmark speed" in ran.err


def test_results_that_cannot_be_written_are_refused_at_once(run, domains, tmp_path):
    (tmp_path / "file").write_text("no folder")
    refused = run("benchmark", "mini", domains, "--out", tmp_path / "file" / "x", *TINY)
    assert refused.status == 1 and "results cannot be written to" in refused.err
