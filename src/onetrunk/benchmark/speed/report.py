"""A speed run as tables, pictures and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ..report.look import INK, picture
from ..report.markdown import table_text
from ..report.tables import Table
from .rounds import Ratio, ratios

Rounds = Sequence[Mapping[str, Any]]
BLUE, GREY = "#3b6ea5", "#9aa3ad"
HEADINGS = {
    "step": "A training step",
    "inference": "A forward",
    "mixed": "A batch of many domains",
    "together": "A step of several domains",
    "cached": "Late layers on cached features",
    "bank": "A bank by its number of domains",
    "memory": "Memory by number of domains",
}
MEMORY = "memory"  # counted, not timed


def by_title(records: Rounds) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each contest."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record["title"], []).append(record)
    return found


def by_backbone(records: Rounds) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Backbone and pixels -> the contests of mixed batches on it."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for title, rounds in by_title(records).items():
        found.setdefault(title.rpartition(", ")[0], {})[title] = rounds
    return found


def contest_table(rounds: Rounds) -> Table:
    """Each contestant's seconds, its ratio with quartiles, bytes where they are counted; the limit
    where there is one, and how many times that the ratio is.
    """
    first, found = rounds[0], ratios(rounds)
    counted, limited = bool(first["bytes"]), bool(first["limits"])
    lines = []
    for name, ratio in found.items():
        limit = first["limits"].get(name)
        line = [
            name,
            f"{1e3 * ratio.seconds:.1f}",
            f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        ]
        if limited:
            line += ["", ""] if not limit else [f"{limit:.2f}", f"{ratio.median / limit:.2f}"]
        if counted:
            line += _bytes(first, name)
        lines.append(tuple(line))
    head = ["contestant", "ms", f"time / {first['reference']}"]
    head += ["limit", "times the limit"] if limited else []
    head += ["MB at the peak", "memory ratio"] if counted else []
    notes = [f"{name}: not run. {reason}" for name, reason in first["skipped"].items()]
    notes.append(f"{len(rounds)} interleaved rounds; medians, quartiles in brackets.")
    return Table(first["title"], tuple(head), tuple(lines), tuple(notes))


def _bytes(first: Mapping[str, Any], name: str) -> list[str]:
    held, reference = first["bytes"].get(name), first["bytes"].get(first["reference"])
    if held is None or not reference:
        return ["", ""]
    return [f"{held / 1e6:.0f}", f"{held / reference:.2f}"]


def memory_table(records: Rounds) -> Table:
    """Bytes by number of domains; the mixture's beside what the deltas alone take."""
    lines = []
    for r in records:
        over = (r["bytes"]["mixed"] - r["backbone"]) / r["deltas"]
        held = (f"{n / 1e6:.1f}" for n in (r["deltas"], *r["bytes"].values()))
        lines.append((str(r["n_domains"]), *held, f"{over:.2f}"))
    head = (
        "domains", "deltas, MB", *(f"{name}, MB" for name in records[0]["bytes"]),
        "mixed beside the backbone / deltas",
    )  # fmt: skip
    backbone = records[0]["backbone"] / 1e6
    note = f"Bytes of distinct storages, the backbone's {backbone:.1f} MB included."
    return Table(f"{records[0]['title']}, rank 8", head, tuple(lines), (note,))


def bars(rounds: Rounds) -> bytes:
    """Ratios of one contest as bars with quartiles; a tick where the limit is."""
    first, found = rounds[0], ratios(rounds)
    names = list(found)[::-1]
    with picture(7.6, 1.2 + 0.42 * len(names)) as canvas:
        axes = canvas.figure.subplots()
        for place, name in enumerate(names):
            ratio, reference = found[name], name == first["reference"]
            axes.barh(place, ratio.median, color=GREY if reference else BLUE, height=0.62)
            axes.errorbar(ratio.median, place, xerr=_reach(ratio), color=INK, elinewidth=1.1)
            limit = first["limits"].get(name)
            if limit is not None:
                axes.plot([limit, limit], [place - 0.4, place + 0.4], color="#c0392b", linewidth=2)
            axes.text(max(ratio.high, limit or 0) + 0.02, place, f"{ratio.median:.2f}", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, 1.12 * max(max(r.high, 1.0) for r in found.values()))
        axes.set(xlabel=f"time / {first['reference']} (red: the limit that counting gives)")
        axes.set_title(first["title"], fontsize=10, loc="left")
        return canvas.png()


def _reach(ratio: Ratio) -> list[list[float]]:
    return [[ratio.median - ratio.low], [ratio.high - ratio.median]]


def mixed_curves(title: str, contests: Mapping[str, Rounds]) -> bytes:
    """Throughput against the plain backbone's, by number of domains that are mixed."""
    points: dict[str, list[tuple[int, float]]] = {}
    for contest, rounds in contests.items():
        n_domains = int(contest.partition(" domain")[0].rpartition(" ")[2])
        for name, ratio in ratios(rounds).items():
            if name != rounds[0]["reference"]:
                points.setdefault(name, []).append((n_domains, 1 / ratio.median))
    with picture(7.6, 4.4) as canvas:
        axes = canvas.figure.subplots()
        for name, curve in points.items():
            axes.plot(*zip(*sorted(curve), strict=True), marker="o", label=name)
        axes.axhline(1.0, color=INK, linewidth=0.9, linestyle="--")
        numbers = sorted({n for curve in points.values() for n, _ in curve})
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, map(str, numbers))
        axes.set_ylim(0, 1.12 * max(1.0, *(y for curve in points.values() for _, y in curve)))
        axes.set(xlabel="domains", ylabel="throughput / plain backbone (dashed)")
        axes.set_title(title, fontsize=10, loc="left")
        axes.legend(fontsize=8)
        return canvas.png()


def memory_curves(records: Rounds) -> bytes:
    """Megabytes by number of domains, both logarithmic."""
    with picture(7.6, 4.4) as canvas:
        axes = canvas.figure.subplots()
        numbers = [r["n_domains"] for r in records]
        for name in records[0]["bytes"]:
            axes.plot(numbers, [r["bytes"][name] / 1e6 for r in records], marker="o", label=name)
        axes.axhline(records[0]["backbone"] / 1e6, color=INK, linewidth=0.9, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="domains", ylabel="MB (dashed: the backbone)")
        axes.set_xticks(numbers, map(str, numbers))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.set_title(f"{records[0]['title']}, rank 8", fontsize=10, loc="left")
        axes.legend(fontsize=8)
        return canvas.png()


def write(records: Sequence[Mapping[str, Any]], out: Path, command: str) -> list[Path]:
    """Writes speed.md, speed.json and the pictures into `out`; the paths of what was written."""
    out.mkdir(parents=True, exist_ok=True)
    parts, files = [f"# Speed\n\n`{command}`\n\n{machine_line(records)}"], []
    for group in HEADINGS:
        own = [r for r in records if r["group"] == group]
        if not own:
            continue
        parts.append(f"## {HEADINGS[group]}")
        for title, rounds in by_title(own).items():
            table = memory_table(rounds) if group == MEMORY else contest_table(rounds)
            parts.append(table_text(table))
            if draw := {"step": bars, "inference": bars, MEMORY: memory_curves}.get(group):
                files.append(out / f"{_slug(group, title)}.png")
                write_atomically(files[-1], draw(rounds))
        if group == "mixed":
            for title, contests in by_backbone(own).items():
                files.append(out / f"{_slug(group, title)}.png")
                write_atomically(files[-1], mixed_curves(title, contests))
    texts = {
        "speed.md": "\n\n".join(parts) + "\n",
        "speed.json": json.dumps(list(records), indent=1),
    }
    for name, text in texts.items():
        files.append(out / name)
        write_atomically(files[-1], text.encode())
    return files


def machine_line(records: Sequence[Mapping[str, Any]]) -> str:
    """The machine that rounds were timed on."""
    machines = {
        f"{r['machine']}, {r.get('cores', '?')} core(s), {r['threads']} thread(s), "
        f"torch {r['torch']}"
        for r in records
        if "machine" in r
    }
    return f"Timed on {'; '.join(sorted(machines))}." if machines else "Nothing was timed."


def _slug(*words: str) -> str:
    text = "-".join(words)
    return "".join(c if c.isalnum() else "-" for c in text).strip("-").replace("--", "-")
