"""Runs -> one HTML file that needs nothing else: text by Jinja, which escapes all of it, charts by BokehJS, inlined.

A content security policy lets no script run but the three of this page, named by their hashes, and nothing be loaded.

    python -m pytest tests/report
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import json
import pathlib
import types

import jinja2
import markupsafe

from minimind_ds import __version__, terminal
from minimind_ds.config.errors import UserError
from minimind_ds.report import tables
from minimind_ds.report.curves import charts

HERE = pathlib.Path(__file__).parent
# Bokeh's copyright notice stands in these files.
BOKEH = ("bokeh.min.js", "bokeh-api.min.js")
# Runs that are told apart by colour; more would need another chart.
MOST_RUNS = 8
# How a report begins.
FIRST = b"<!doctype html>\n<html lang=\"en\">"


def render(runs: list[tables.Shown]) -> str:
    """Raises UserError without Bokeh."""
    scripts = [*bokeh(), (HERE / "charts.js").read_text(encoding="utf-8")]
    curves = charts([shown.run for shown in runs])
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=finalize)
    environment.filters |= {"size": terminal.size, "share": tables.share, "grouped": lambda value: f"{value:,.0f}",
                            "path": tables.path_of}
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("page.html").render(
        runs=runs, curves=curves, title=", ".join(shown.run.name for shown in runs), now=now, version=__version__,
        differing=tables.differing(runs), heads=types.SimpleNamespace(
            source=tables.SOURCE_HEAD, start=tables.START_HEAD, number=tables.NUMBER_HEAD),
        memory_rows=lambda memory: [[part, terminal.size(planned)] for part, planned in memory.parts],
        pairs=lambda settings: [[name, value] for name, value, _ in settings],
        style=markupsafe.Markup((HERE / "page.css").read_text(encoding="utf-8")), scripts=list(map(inlined, scripts)),
        hashes=list(map(fingerprint, scripts)), numbers=as_json([dataclasses.asdict(curve) for curve in curves]),
        ds_text=lambda ds: json.dumps(ds, indent=2, ensure_ascii=True))


def finalize(value: object) -> object:
    """What stands between {{ and }}: text of files is cleaned, and escaped afterwards; our own markup stays."""
    return value if isinstance(value, markupsafe.Markup) else tables.clean(value)


def bokeh() -> list[str]:
    try:
        from bokeh.util.paths import bokehjs_path

        folder = pathlib.Path(bokehjs_path()) / "js"
        return [(folder / name).read_text(encoding="utf-8") for name in BOKEH]
    except (ImportError, OSError) as error:
        raise UserError(f"the report's charts need Bokeh (pip install bokeh): {error}") from None


def inlined(script: str) -> markupsafe.Markup:
    assert "</script" not in script.lower() and "<!--" not in script, "the script would end its element"
    return markupsafe.Markup(script)


def fingerprint(script: str) -> str:
    """As a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def as_json(value: object) -> markupsafe.Markup:
    """JSON that ends no element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return markupsafe.Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
