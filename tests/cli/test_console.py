"""Progress where nobody looks on: a line now and then, with the time left."""

import itertools

from onetrunk.cli import console
from onetrunk.cli.console import Screen


def told(monkeypatch, capsys, shown, **screen):
    """What a run that shows every ten seconds leaves on standard error."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with Screen(**screen).bar("training flowers") as show:
        for done in shown:
            show(done, 20, f"loss {done}.0")
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_a_line_every_half_minute_with_the_time_left(monkeypatch, capsys):
    assert told(monkeypatch, capsys, range(8)) == [
        "training flowers: 2/20 loss 2.0, 0:00:30, left 0:03:00",
        "training flowers: 5/20 loss 5.0, 0:01:00, left 0:02:30",
    ]


def test_a_log_says_what_is_read_while_no_step_is_done(monkeypatch, capsys):
    assert told(monkeypatch, capsys, [0, 0, 0]) == ["training flowers: 0/20 loss 0.0, 0:00:30"]


def test_a_resumed_run_counts_its_own_steps(monkeypatch, capsys):
    assert told(monkeypatch, capsys, range(10, 14)) == [
        "training flowers: 12/20 loss 12.0, 0:00:30, left 0:01:20"
    ]


def test_short_work_and_a_silent_process_leave_no_line(monkeypatch, capsys):
    assert told(monkeypatch, capsys, range(2)) == []
    assert told(monkeypatch, capsys, range(8), quiet=True) == []


def test_names_are_shown_as_they_are_and_command_no_terminal(capsys):
    screen = Screen()
    screen.say("a:cat:b [/b]x \\[b]y \x1b[31mred")
    screen.table(("class", "n"), [("a:cat:b", "1"), ("[/b]x" * 40, "2"), ("\x1b[31mred", "3")])
    said, _, first, second, third = capsys.readouterr().out.splitlines()
    assert said == "a:cat:b [/b]x \\[b]y \N{REPLACEMENT CHARACTER}[31mred"
    assert (first.split(), second.split()) == (["a:cat:b", "1"], ["[/b]x" * 40, "2"])
    assert third.split() == ["\N{REPLACEMENT CHARACTER}[31mred", "3"]
