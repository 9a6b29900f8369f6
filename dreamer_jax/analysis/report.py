"""The report of an analysis: one HTML page with all figures in it, and the same figures as files beside it.

The page needs no network, no JavaScript and no other file. Every text that comes from data is escaped where it enters.
"""

import base64
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from dreamer_jax.analysis.captures import CHANGES, AnalysisError, Captures
from dreamer_jax.analysis.experts import NONE, SHARE, Row, experts_for, paper_numbers
from dreamer_jax.analysis.gallery import Missing, Plate, compared, labels, missing, plates
from dreamer_jax.figures import image, save
from dreamer_jax.files import write_whole
from dreamer_jax.training.metrics import gini

PAGE, FIGURES = "report.html", "figures"
STYLE_SHEET = Path(__file__).with_name("report.css")
SMALL = 60_000
"""Bytes up to which a figure stands in the page as an SVG, which is sharp at any size; larger ones as a PNG."""
DPI = 130.0
"""Of a PNG in the page: sharp at the width of a column, and twenty of them are a few megabytes."""
PIXELS = 110
"""Of an inch of a figure, at most: text of 8 points can be read."""
NUMBER, LONG = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?|–"), 24
"""What is set as a number, and characters from which on a text needs room in its column."""

Cell = str | int | float | None


class Section(NamedTuple):
    """A part of the page with a heading; the heading's level and number follow from where the section stands."""

    title: str
    body: str = ""
    """HTML below the heading."""
    parts: tuple["Section", ...] = ()


def write(captures: Sequence[Captures], out: Path) -> Path:
    """Write report.html and figures/ into `out`, a folder that is made if need be.

    Args:
        captures: of one model, or of several to compare. The first LA among them is the baseline of the others.
        out: where to write. Figures of several models get a folder each.

    Returns:
        The page.

    Raises:
        AnalysisError: there are no captures.
    """
    if not captures:
        raise AnalysisError("a report needs the captures of at least one model: analyze a checkpoint first")
    names = labels(captures)
    if len(captures) == 1:
        sections = _of_one_model(captures[0], None, out, FIGURES)
    else:
        sections = (Section("Side by side", parts=_side_by_side(captures, names, out)), *_each(captures, names, out))
    page = out / PAGE
    write_whole(page, _page(f"Analysis of {', '.join(names)}", _lead(captures), sections))
    return page


def _each(captures: Sequence[Captures], names: Sequence[str], out: Path) -> Iterable[Section]:
    """A section for each model, with figures in a folder that no other model has."""
    for i, (found, name) in enumerate(zip(captures, names, strict=True), 1):
        folder = f"{FIGURES}/{i}_{re.sub(r'[^A-Za-z0-9-]+', '_', name)}"
        yield Section(name, parts=_of_one_model(found, _baseline(found, captures), out, folder))


def _of_one_model(captures: Captures, baseline: Captures | None, out: Path, folder: str) -> tuple[Section, ...]:
    sections = [
        Section("The run", _run_table([captures], ["value"])),
        Section("The paper's numbers beside ours", _paper_table(paper_numbers(captures, baseline))),
        Section("By depth", _depth_tables(captures)),
        Section("Removals", _removal_table(captures)),
        Section("Figures", parts=_drawn(plates(captures), out, folder)),
        Section("What is missing, and why", _missing_list(missing(captures))),
        Section("Configuration of the model", _config_table(captures.about.config)),
    ]
    return tuple(section for section in sections if section.body or section.parts)


def _side_by_side(captures: Sequence[Captures], names: Sequence[str], out: Path) -> tuple[Section, ...]:
    found = [paper_numbers(one, _baseline(one, captures)) for one in captures]
    return (
        Section("The runs", _run_table(captures, names)),
        Section("The paper's numbers", _paper_comparison(found, names)),
        Section("Figures", parts=_drawn(compared(captures), out, FIGURES)),
    )


def _baseline(captures: Captures, among: Sequence[Captures]) -> Captures | None:
    """The first other model of classic layers."""
    return next((other for other in among if not other.about.depth_recurrent and other is not captures), None)


def _lead(captures: Sequence[Captures]) -> str:
    """What was looked at, in a sentence."""
    about = captures[0].about
    if len(captures) > 1:
        return "How these models use their depths and experts, side by side and one by one."
    return (
        f"How a model of type {about.variant} uses its {about.depth} depths and its experts, after {about.step:,} "
        f"training steps. Packed rows that were read: {about.sequences:,} of {about.context:,} tokens; {about.source}."
    )


# Tables.


def _run_table(captures: Sequence[Captures], names: Sequence[str]) -> str:
    rows: list[tuple[str, Callable[[Captures], Cell]]] = [
        ("Variant", lambda c: c.about.variant),
        ("Training step", lambda c: c.about.step),
        ("Depths that ran", lambda c: c.about.depth),
        ("Depth in training", lambda c: c.about.trained_depth),
        ("Parameters", lambda c: c.about.parameters),
        ("Active experts of a token", lambda c: ", ".join(f"{name}: {n}" for name, n in c.about.active.items())),
        ("Data", lambda c: c.about.source),
        ("Sequences", lambda c: c.about.sequences),
        ("Tokens of a sequence", lambda c: c.about.context),
        ("Tokens that were seen", lambda c: _scalar(c, "tokens")),
        ("Positions that the loss counts", lambda c: _scalar(c, "positions")),
        ("Sequences behind the removals", lambda c: c.about.removal_sequences),
        ("Seed", lambda c: c.about.seed),
        ("Loss after the last depth (nats)", lambda c: f"{c['lens/loss'][-1]:.3f}" if "lens/loss" in c else None),
    ]
    return _table("What was analyzed", ["", *names], [[what, *(of(c) for c in captures)] for what, of in rows])


def _paper_table(rows: Sequence[Row]) -> str:
    cells = [[row.what, row.paper, row.ours, row.note] for row in rows]
    return _table("The paper's are of DR+DA at depth 32", ["", "paper", "ours", "note"], cells) if rows else ""


def _paper_comparison(found: Sequence[Sequence[Row]], names: Sequence[str]) -> str:
    """A column for each model; a number that one of them has none of is a dash."""
    paper = {row.what: row.paper for rows in found for row in rows}
    ours = [{row.what: row.ours for row in rows} for rows in found]
    cells = [[what, value, *(model.get(what) for model in ours)] for what, value in paper.items()]
    return _table("The paper's are of DR+DA at depth 32", ["", "paper", *names], cells)


def _depth_tables(captures: Captures) -> str:
    """Of each depth: what the LM head reads out, which experts it uses, how large the stream is."""
    tables = {
        "What the LM head reads out of each depth; losses in nats": _lens_columns(captures),
        "Selections of each depth": _expert_columns(captures),
        "The residual stream": _residual_columns(captures),
    }
    return "".join(_columns(caption, columns) for caption, columns in tables.items() if columns)


def _columns(caption: str, columns: dict[str, list[str]]) -> str:
    rows = [[depth, *cells] for depth, cells in enumerate(zip(*columns.values(), strict=True), 1)]
    return _table(caption, ["depth", *columns], rows)


def _lens_columns(captures: Captures) -> dict[str, list[str]]:
    found = {"loss": _written(captures["lens/loss"], "{:.3f}")} if "lens/loss" in captures else {}
    shares = {"agrees with the last": "lens/agreement", "accuracy": "lens/accuracy"}
    found |= {f"{title} (%)": _percent(captures[name]) for title, name in shares.items() if name in captures}
    if "lens/change" in captures:
        changes = zip(CHANGES, captures["lens/change"].T, strict=True)
        found |= {f"{change} from here on (%)": _percent(share) for change, share in changes}
    return found


def _expert_columns(captures: Captures) -> dict[str, list[str]]:
    found = {}
    for dimension in captures.names("experts/*/counts"):
        counts = captures[f"experts/{dimension}/counts"]
        found[f"{dimension}: Gini"] = _written(gini(counts), "{:.3f}")
        found[f"{dimension}: experts for {100 * SHARE:.0f} %"] = _written(experts_for(counts), "{:,}")
    return found


def _residual_columns(captures: Captures) -> dict[str, list[str]]:
    titles = {"residual/rms": "RMS after the depth", "residual/step": "RMS of what it adds"}
    return {title: _written(captures[name], "{:,.3f}") for name, title in titles.items() if name in captures}


def _percent(shares: np.ndarray) -> list[str]:
    return _written(100 * shares, "{:.1f}")


def _written(values: np.ndarray, form: str) -> list[str]:
    return [NONE if math.isnan(value) else form.format(value) for value in values.tolist()]


def _removal_table(captures: Captures) -> str:
    """Losses with a part left out, and how much worse they are; the worst first."""
    if "removal/loss" not in captures:
        return ""
    whole = float(captures["removal/loss"])
    dimensions = captures.names("removal/dimension/*")
    parts = {f"without {name}": float(captures[f"removal/dimension/{name}"]) for name in dimensions}
    if "removal/depth" in captures:
        parts |= {f"without depth {i}": float(loss) for i, loss in enumerate(captures["removal/depth"], 1)}
    rows: list[list[Cell]] = [["nothing left out", f"{whole:.3f}", None]]
    rows += [
        [what, f"{loss:.3f}", f"{loss - whole:+.3f}"] for what, loss in sorted(parts.items(), key=lambda part: -part[1])
    ]
    caption = f"On {captures.about.removal_sequences:,} sequences, in nats; the largest loss first"
    return _table(caption, ["", "loss", "change"], rows)


def _config_table(config: dict[str, Any]) -> str:
    rows = [[key, _text(value)] for key, value in _flat(config, "")]
    return _table("The model section of the run's config", ["key", "value"], rows) if rows else ""


def _flat(config: dict[str, Any], before: str) -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _scalar(captures: Captures, name: str) -> int | None:
    return int(captures[name]) if name in captures else None


# Figures.


def _drawn(found: Sequence[Plate], out: Path, folder: str) -> tuple[Section, ...]:
    """The plates as parts of the page; each is written into a folder beside the page as well."""
    (out / folder).mkdir(parents=True, exist_ok=True)
    earlier = (out / PAGE).read_text(encoding="utf-8") if (out / PAGE).is_file() else ""
    for path in (out / folder).iterdir():  # figures of the report that goes, and no file of others
        named = f'href="{quote(f"{folder}/{path.name}")}"' in earlier
        if named and path.stem not in {plate.name for plate in found}:
            path.unlink()
    saved = (save(plate.figure, out / folder / plate.name) for plate in found)
    return tuple(Section(p.title, _figure(p, files, folder)) for p, files in zip(found, saved, strict=True))


def _figure(plate: Plate, files: tuple[Path, Path], folder: str) -> str:
    links = ", ".join(f'<a href="{quote(f"{folder}/{path.name}")}">{escape(path.name)}</a>' for path in files)
    width, height = (round(PIXELS * inches) for inches in plate.figure.get_size_inches())
    return (
        f'<figure><img src="{_inlined(plate, files[1])}" width="{width}" height="{height}" '
        f'alt="{escape(plate.title)}">'
        f'<figcaption><p>{escape(plate.text)}</p><p class="files">{links}</p></figcaption></figure>\n'
    )


def _inlined(plate: Plate, svg: Path) -> str:
    drawn, kind = svg.read_bytes(), "svg+xml"
    if len(drawn) > SMALL:
        drawn, kind = image(plate.figure, "png", DPI), "png"
    return f"data:image/{kind};base64,{base64.b64encode(drawn).decode()}"


def _missing_list(found: Sequence[Missing]) -> str:
    if not found:
        return ""
    return "<dl>" + "".join(f"<dt>{escape(m.title)}</dt><dd>{escape(m.why)}</dd>\n" for m in found) + "</dl>\n"


# The page.


def _page(title: str, lead: str, sections: Sequence[Section]) -> str:
    body = "".join(_section(section, 2, str(i)) for i, section in enumerate(sections, 1))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE_SHEET.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>\n"
        f'<nav aria-label="Contents"><details open><summary>Contents</summary>{_contents(sections)}</details></nav>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _section(section: Section, level: int, number: str) -> str:
    parts = "".join(_section(part, level + 1, f"{number}.{i}") for i, part in enumerate(section.parts, 1))
    heading = f"<h{level}>{escape(section.title)}</h{level}>"
    return f'<section id="s{number}">\n{heading}\n{section.body}{parts}</section>\n'


def _contents(sections: Sequence[Section], before: str = "", levels: int = 2) -> str:
    """Links to the sections and to their parts."""
    if not sections or not levels:
        return ""
    items = (
        f'<li><a href="#s{before}{i}">{escape(section.title)}</a>'
        f"{_contents(section.parts, f'{before}{i}.', levels - 1)}</li>\n"
        for i, section in enumerate(sections, 1)
    )
    return f"<ol>{''.join(items)}</ol>"


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table in a box that scrolls by itself where the screen is narrower; the first cell of a row names it."""
    kinds = [_kind(column) for column in zip(*rows, strict=True)]
    heads = "".join(
        _cell("th", text, kind, "col") if text else "<td></td>" for text, kind in zip(head, kinds, strict=True)
    )
    body = "".join(
        f"<tr>{_cell('th', row[0], kinds[0], 'row')}"
        f"{''.join(_cell('td', cell, kind) for cell, kind in zip(row[1:], kinds[1:], strict=True))}</tr>\n"
        for row in rows
    )
    return (
        f'<p class="caption">{escape(caption)}</p>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _kind(column: Sequence[Cell]) -> str:
    """How a column is set: numbers flush right, long texts not too narrow."""
    texts = [_text(cell) for cell in column]
    if all(NUMBER.fullmatch(text) for text in texts) and set(texts) != {NONE}:
        return "number"
    return "long" if max(map(len, texts)) > LONG else "short"


def _cell(tag: str, cell: Cell, kind: str, scope: str = "") -> str:
    scope = f' scope="{scope}"' if scope else ""
    return f'<{tag} class="{kind}"{scope}>{escape(_text(cell))}</{tag}>'


def _text(value: Any) -> str:
    """A value as it stands in a table: thousands apart, four digits of what is measured, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
