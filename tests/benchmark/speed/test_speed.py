"""benchmark speed: ratios within rounds, every group end to end on a small network, its report."""

import itertools
import json

import pytest
import torch

from onetrunk.benchmark.ledger import Ledger
from onetrunk.benchmark.report.look import Canvas
from onetrunk.benchmark.report.markdown import table_text
from onetrunk.benchmark.speed import (
    SUBJECTS,
    bank,
    cached,
    inference,
    memory,
    mixed,
    run,
    step,
    together,
)
from onetrunk.benchmark.speed.report import (
    bars,
    contest_table,
    memory_curves,
    memory_table,
    mixed_curves,
    write,
)
from onetrunk.benchmark.speed.rounds import Contest, ratios, run_rounds
from onetrunk.benchmark.speed.subjects import Subject, take_apart
from onetrunk.core.adapted import Adapted
from onetrunk.errors import SpecError, TrainingError

MACHINE = {"machine": "a machine", "threads": 1, "torch": "2.6.0"}
PNG = b"\x89PNG"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.read("resnet26(width=0.125)@16")


def invented(title="net, 16 px", **seconds: list[float]) -> list[dict]:
    rounds = zip(*seconds.values(), strict=True)
    return [
        {
            "group": "step", "title": title, "reference": next(iter(seconds)), "round": k,
            "seconds": dict(zip(seconds, values, strict=True)), "limits": {"ours": 0.4},
            "bytes": {"plain": 1000, "ours": 500}, "skipped": {"rival": "it is missing"},
            "cores": 2, **MACHINE,
        }
        for k, values in enumerate(rounds)
    ]  # fmt: skip


def test_a_ratio_is_taken_within_its_round():
    found = ratios(invented(plain=[1.0, 2.0, 4.0], ours=[0.5, 1.0, 3.0]))
    assert found["ours"].median == 0.5 and found["ours"].high == pytest.approx(0.625)
    assert found["plain"] == (ratios(invented(plain=[1.0, 2.0, 4.0]))["plain"])
    assert found["ours"].seconds == 1.0


def test_every_contestant_runs_once_a_round_in_a_drawn_order_and_none_again(tmp_path):
    ran: list[str] = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    contest = Contest("step", "net", "a", calls)
    first = run_rounds(contest, 3, Ledger(tmp_path), MACHINE)
    rounds = [ran[k : k + 3] for k in range(3, 12, 3)]  # after one that warms up
    assert len(ran) == 12 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert run_rounds(contest, 3, Ledger(tmp_path), MACHINE) == first and len(ran) == 12
    assert len(run_rounds(contest, 4, Ledger(tmp_path), MACHINE)) == 4 and len(ran) == 18


def test_a_step_is_timed_and_its_bytes_are_counted(subject, tmp_path):
    (contest,) = step.contests(subject, batch=4)
    assert contest.skipped.keys() | contest.calls.keys() >= {
        "fine-tuning", "head only", "parallel", "parallel, beside the layer", "lowrank(rank=8)",
        "PEFT LoRA, equal numbers",
    }  # fmt: skip
    assert contest.limits["parallel"] == pytest.approx(2 / 3 + 1 / 27, rel=0.05)
    assert contest.bytes["parallel"] < contest.bytes["fine-tuning"]
    rounds = run_rounds(contest, 3, Ledger(tmp_path), MACHINE)
    assert all(seconds > 0 for r in rounds for seconds in r["seconds"].values())


def test_apart_means_that_nothing_is_folded(subject):
    sites = [m for m in take_apart(subject.domain(None)).modules() if isinstance(m, Adapted)]
    assert sites and not any(site.folds for site in sites)


def test_forwards_and_mixed_batches_are_timed(subject, tmp_path):
    contests = [*inference.contests(subject, compiled=False)]
    contests += mixed.contests(subject, batch=6, numbers=(1, 3))
    for contest in contests:
        rounds = run_rounds(contest, 3, Ledger(tmp_path), MACHINE)
        assert rounds[0]["seconds"].keys() == contest.calls.keys()
        assert contest.reference in contest.calls
    assert "PEFT set_adapter and split, rank 8" in contests[-1].calls
    assert contests[-1].limits["mix, parallel"] == pytest.approx(1 + 1 / 9, rel=0.05)
    drawn = {c.title: run_rounds(c, 3, Ledger(tmp_path), MACHINE) for c in contests[-2:]}
    assert mixed_curves("resnet", drawn).startswith(PNG)


def test_the_curves_of_mixed_batches_show_every_contestant_and_name_the_backbone(monkeypatch):
    seconds = {"plain": 1.0, "merged": 0.25, "mix": 1.25}
    rounds = [{"reference": "plain", "seconds": seconds}] * 3
    monkeypatch.setattr(Canvas, "png", lambda canvas: canvas.figure)
    figure = mixed_curves("resnet26, 64 px", {"resnet26, 64 px, 64 of 256 domains": rounds})
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "resnet26, 64 px"
    for line in axes.lines:
        assert all(0 <= y <= axes.get_ylim()[1] for y in line.get_ydata())
    assert [line.get_xdata()[0] for line in axes.lines[:2]] == [256, 256]


def test_a_title_says_how_many_of_the_domains_a_batch_can_hold(subject):
    (contest,) = mixed.contests(subject, batch=2, numbers=(65,))
    assert contest.title.endswith(", 2 of 65 domains in a batch of 2")


def test_several_domains_features_and_banks_are_timed(subject, tmp_path):
    found = itertools.chain(
        together.contests(subject, ((2, 2),)),
        cached.contests(subject),
        bank.contests(subject, (3, 5)),
    )
    names = {}
    for contest in found:  # one by one: a bank's folder is gone after its contests
        rounds = run_rounds(contest, 3, Ledger(tmp_path), MACHINE)
        assert rounds[0]["seconds"].keys() == contest.calls.keys() and not contest.skipped
        names[contest.title.partition(", ")[2]] = set(contest.calls)
        if contest.group == "cached":
            assert 0 < contest.limits["late third on features, an epoch"] < 1 / 3
    assert names["16 px, 2 domains, 2 images each"] >= {"by turns", "in one batch"}
    assert names["16 px, opening a bank 10 times"] == {"3 domains", "5 domains"}
    assert len(names) == 4


def test_memory_counts_distinct_storages(subject):
    small, large = memory.records(subject, (1, 8))
    assert large["deltas"] == 8 * small["deltas"]
    held = large["bytes"]["mixed"] - large["backbone"]
    assert 0.5 * large["deltas"] < held <= 1.3 * large["deltas"]
    table = memory_table([small, large])
    assert memory_curves([small, large]).startswith(PNG)
    assert table.rows[1][0] == "8" and table.head[-1] == "mixed beside the backbone / deltas"


def test_the_report_shows_ratios_limits_bytes_and_what_was_left_out(tmp_path):
    rounds = invented(plain=[1.0, 2.0, 4.0], ours=[0.5, 1.0, 3.0])
    text = table_text(contest_table(rounds))
    assert "| ours | 1000.0 | 0.50 (0.50 to 0.62) | 0.40 | 1.25 | 0 | 0.50 |" in text
    assert "rival: not run. it is missing" in text and "3 interleaved rounds" in text
    assert bars(rounds).startswith(PNG)
    many = [
        {**r, "group": "mixed", "title": f"{net}, 16 px, {n} domains in a batch of 6"}
        for r in rounds for net in ("one", "other") for n in (1, 4)
    ]  # fmt: skip
    out = tmp_path / "not there yet"
    files = write([*rounds, *many], out, "onetrunk benchmark speed")
    assert {path.name for path in files} == {
        "speed.md", "speed.json", "step-net-16-px.png", "mixed-one-16-px.png",
        "mixed-other-16-px.png",
    }  # fmt: skip
    assert json.loads((out / "speed.json").read_text()) == [*rounds, *many]
    assert "a machine, 2 core(s), 1 thread(s), torch 2.6.0" in (out / "speed.md").read_text()


def test_what_cannot_be_run_is_refused_first(tmp_path):
    with pytest.raises(SpecError, match="no group 'latency' in benchmark speed: it has step"):
        run(("latency",), SUBJECTS, 3, tmp_path)
    with pytest.raises(SpecError, match="after @ comes the side in pixels"):
        run(("step",), ("resnet26(width=0.125)@large",), 3, tmp_path)
    with pytest.raises(TrainingError, match="2 rounds have no spread: give --repeats 3"):
        run(("step",), SUBJECTS, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []
