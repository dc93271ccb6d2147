"""write_report: every file, the same figures in all of them, nothing fetched, nothing run."""

import base64
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from onetrunk.benchmark.report import MethodLabel, Place, read_rows, write_report
from onetrunk.errors import DataError, MissingExtraError

METHODS = [
    MethodLabel("head", "Probe", "base"),
    MethodLabel("parallel", "Parallel", "adapters"),
    MethodLabel("full", "Fine-tuning", "reference"),
]
COMMAND = "onetrunk benchmark mini --data photos"
HOSTILE = '<script>alert("1")</script>'


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data


def written(rows, out, methods=METHODS):
    return {path.name: path for path in write_report(rows, methods, out, "mini", COMMAND)}


@pytest.fixture(scope="module")
def rows(table):
    return table(["head", "parallel", "full"], ["signs", "faces"], [0, 1])


@pytest.fixture(scope="module")
def files(rows, tmp_path_factory):
    return written(rows, tmp_path_factory.mktemp("report") / "new" / "folder")


def test_what_is_missing_is_listed_with_the_reasons(rows, tmp_path):
    expected = [Place("mini", rows[0]["backbone"], "head", "gone", 0, None)]
    write_report(
        rows, METHODS, tmp_path, "mini", COMMAND, expected, ["left out: head gone: no test"]
    )
    said = json.loads((tmp_path / "mini.json").read_text())["missing"]
    assert said == [
        f"mini, {rows[0]['backbone']}: Probe lacks 1 of 1 cell (all)",
        "left out: head gone: no test",
    ]
    assert all(line in (tmp_path / "mini.md").read_text() for line in said)


def test_the_report_is_whole_and_its_pictures_are_pngs(files):
    assert {"mini.md", "mini.json", "mini.html"} < set(files)
    pictures = [path for name, path in files.items() if name.endswith(".png")]
    assert len(pictures) == 5  # accuracy twice, change by layer, a map of each adapted method
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in pictures)
    assert set(files.values()) == set(files["mini.md"].parent.iterdir())


def test_a_report_replaces_the_earlier_one_and_leaves_other_files_alone(rows, tmp_path):
    before = written(rows, tmp_path)
    own = [tmp_path / "mine.png", *write_report(rows, METHODS, tmp_path / "t", "transfer", "x")]
    own[0].write_bytes(b"mine")
    after = written([row for row in rows if row["method"] == "head"], tmp_path)
    assert set(after) < set(before)
    assert {path for path in tmp_path.iterdir() if path.is_file()} == {*after.values(), own[0]}
    foreign = [tmp_path / "t" / "out.png", tmp_path / "notes.txt", tmp_path / "3"]
    for path in foreign:
        path.write_bytes(b"mine")
    (tmp_path / "mini.json").write_text('{"pictures": ["t/out.png", "notes.txt", 3]}')
    written(rows[:1], tmp_path)
    assert all(path.exists() for path in (*own, *foreign))


def test_the_page_needs_nothing_but_itself(files):
    text = files["mini.html"].read_text()
    page = Page(text)
    assert not {"link", "iframe", "object", "embed", "a"} & {tag for tag, _ in page.tags}
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 5
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(
            b"\x89PNG"
        )
    assert not re.search(r"https?:|url\(|@import|//\w", re.sub(r"base64,[\w+/=]+", "", text))
    assert COMMAND in page.text and "onetrunk: mini" in page.text


def test_names_from_rows_are_text_and_nothing_else(row, tmp_path):
    hostile = [
        row(HOSTILE, HOSTILE, 0, backbone=HOSTILE, machine=HOSTILE, study=HOSTILE),
        row("full", HOSTILE, 0, backbone=HOSTILE, study=HOSTILE),
    ]
    files = written(hostile, tmp_path)
    page = Page(files["mini.html"].read_text())
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "results"}]
    assert page.text.count(HOSTILE) > 3
    assert "<script>" not in files["mini.md"].read_text()
    assert all(re.fullmatch(r"[\w.-]+", name) for name in files)
    assert set(files.values()) == set(tmp_path.iterdir())


def test_the_rows_are_in_the_page_and_in_the_json(rows, files):
    kept = json.loads(files["mini.json"].read_text())["rows"]
    assert [row["test_accuracy"] for row in kept] == [row["test_accuracy"] for row in rows]
    text = files["mini.html"].read_text()
    embedded = re.search(r'id="results">(.*?)</script>', text, flags=re.S)
    assert json.loads(embedded[1]) == kept


def test_the_figures_of_the_json_are_those_of_the_table(files):
    markdown = files["mini.md"].read_text()
    (section,) = json.loads(files["mini.json"].read_text())["sections"]
    for method in section["methods"]:
        assert f"{100 * method['accuracy']['mean']:.1f}" in markdown
    assert f"- command: {COMMAND}" in markdown


def test_what_is_missing_stands_above_the_tables(rows, tmp_path):
    expected = [row.place for row in read_rows(rows)]
    write_report(rows[:-1], METHODS, tmp_path, "mini", COMMAND, expected)
    files = {path.name: path for path in tmp_path.iterdir()}
    line = "mini, resnet26(width=0.5): Fine-tuning lacks 1 of 4 cells (faces 1)"
    assert line in Page(files["mini.html"].read_text()).text
    assert line in files["mini.md"].read_text()
    assert json.loads(files["mini.json"].read_text())["missing"] == [line]


def test_each_study_and_backbone_has_a_section_of_its_own(rows, table, tmp_path):
    few = {"domains": ["signs", "faces"], "seeds": [0]}
    others = table(["head", "full"], **few, backbone="timm:resnet18")
    transfer = table(["parallel", "full"], **few, study="transfer", per_class=5)
    files = written([*rows[:2], *others, *transfer], tmp_path)
    sections = json.loads(files["mini.json"].read_text())["sections"]
    assert [section["title"] for section in sections] == [
        "mini: resnet26(width=0.5)", "mini: timm:resnet18", "transfer: resnet26(width=0.5)",
    ]  # fmt: skip
    assert "with 5 images a class" in sections[2]["sentence"]


def test_a_probe_alone_changes_no_layer_and_has_no_rate_to_show(row, tmp_path):
    probe = row("head", "signs", 0, lr=None, decay=None, trials=[], site_change={"stem": 0.0})
    files = written([probe], tmp_path)
    assert not [name for name in files if name.startswith("change")]
    assert "Chosen" not in files["mini.md"].read_text()


def test_a_second_report_replaces_the_first(rows, tmp_path):
    first = written(rows[:1], tmp_path)["mini.md"].read_text()
    assert written(rows[:2], tmp_path)["mini.md"].read_text() != first
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_without_a_row_the_command_is_named(tmp_path):
    with pytest.raises(
        DataError, match=f"no finished cell to show. Run the study first: {COMMAND}"
    ):
        written([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(row, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the report cannot be written to .*file"):
        written([row("full", "signs", 0)], tmp_path / "file")


def test_without_matplotlib_nothing_is_written(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="a report needs matplotlib"):
        written(rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
