"""The ledger: every record whole, the first of a key, a cut last line no loss, a bad one named."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from onetrunk.benchmark.ledger import Ledger, digest_of
from onetrunk.errors import TrainingError


def test_what_is_appended_is_read(tmp_path):
    ledger = Ledger(tmp_path / "new" / "folder")
    ledger.append({"key": "a", "accuracy": 0.25})
    ledger.append({"key": "b", "accuracy": 0.5})
    assert {key: r["accuracy"] for key, r in ledger.read().items()} == {"a": 0.25, "b": 0.5}


def test_ledgers_of_several_machines_in_one_folder_are_one_and_the_first_record_counts(tmp_path):
    Ledger(tmp_path).append({"key": "a", "accuracy": 0.25})
    (tmp_path / "other.jsonl").write_text('{"key": "a", "accuracy": 1.0}\n{"key": "c"}\n')
    assert Ledger(tmp_path).read() == {"a": {"key": "a", "accuracy": 0.25}, "c": {"key": "c"}}


def test_a_line_cut_off_by_a_kill_is_left_out_and_the_next_record_takes_its_place(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append({"key": "a"})
    with ledger.path.open("a") as file:
        file.write('{"key": "b", "accur')
    assert list(ledger.read()) == ["a"]
    ledger.append({"key": "c"})
    assert list(ledger.read()) == ["a", "c"]
    assert [json.loads(line)["key"] for line in ledger.path.read_text().splitlines()] == ["a", "c"]


def test_a_record_whose_line_an_editor_left_open_stays(tmp_path):
    (tmp_path / "cells.jsonl").write_text('{"key": "a"}\n{"key": "b"}')
    Ledger(tmp_path).append({"key": "c"})
    assert list(Ledger(tmp_path).read()) == ["a", "b", "c"]


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "cells.jsonl").write_text('{"key": "a"}\n[1]\n{"key": "b"}\n')
    with pytest.raises(TrainingError, match=r"cells.jsonl, line 2 is no record.*Remove that line"):
        Ledger(tmp_path).read()


def test_writers_at_once_lose_nothing(tmp_path):
    ledger = Ledger(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: ledger.append({"key": str(n), "text": "x" * 5000}), range(40)))
    assert sorted(ledger.read(), key=int) == [str(n) for n in range(40)]


def test_a_digest_depends_on_values_and_not_on_order():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})
