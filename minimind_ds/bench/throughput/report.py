"""What a sweep found, for people: a Markdown table, a CSV with everything, and plots where matplotlib is installed.

    python launch/benchmark.py --report
"""

from __future__ import annotations

import csv
import importlib.util
import pathlib

from minimind_ds import terminal
from minimind_ds.bench.throughput.watch import PARTS

MB = 2**20
KINDS = ("parameters", "optimizer", "gradients", "buckets")


def write(document: dict, folder: pathlib.Path) -> list[str]:
    """Write results.md, results.csv and the plots.  -> lines for the terminal: a table, then the files."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = document["cells"]
    (folder / "results.md").write_text(table(cells) + "\n", encoding="utf-8")
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as f:
        rows = [flat(c) for c in cells]
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(rows)
    lines = [*narrow(cells), "", f"wrote {folder / 'results.json'}, results.md, results.csv, with all columns"]
    if importlib.util.find_spec("matplotlib") is None:
        return [*lines, "no plots: matplotlib is not installed (pip install minimind_ds[plot])"]
    from minimind_ds.bench.throughput import plots

    return [*lines, "plots: " + ", ".join(path.name for path in plots.draw(cells, folder))]


def stem(cell: dict) -> str:
    return pathlib.Path(cell["cell"]["deepspeed"]).stem


def shape(cell: dict) -> str:
    c = cell["cell"]
    return f"{c['row_len']}x{c['batch_size']}x{c['accumulation']}"


def peak(cell: dict) -> float:
    """Bytes at the peak: the GPU's where there is one, else the process's."""
    m = cell["memory"]
    return m["peak_rss"] if m["peak_allocated"] is None else m["peak_allocated"]


def state(cell: dict, which: str) -> float:
    """Bytes of training state, "held" or "planned", buckets left out: they are not there at the update."""
    return sum(cell["memory"][which].get(kind, 0) for kind in KINDS[:3])


def narrow(cells: list[dict]) -> list[str]:
    """What fits a terminal of the table: a line a cell, then those without a result."""
    def name(c: dict) -> str:
        return f"{c['cell']['preset']} {stem(c)}, {terminal.count(c['cell']['ranks'], 'rank')}"

    rows = [(name(c), [shape(c), c["cell"]["kernels"], c["dtype"], f"{c['tokens_per_s']:,.0f}", f"{c['step_s']:.3f}",
                       f"{c['mfu']:.1%}", f"{state(c, 'held') / MB:,.0f}", f"{peak(c) / MB:,.0f}",
                       f"{c['sent_bytes_per_step'] / MB:,.1f}", f"{c['packing_fill']:.2%}"])
            for c in cells if c["status"] == "ok"]
    names = ["rows", "kernels", "dtype", "tokens/s", "step s", "MFU", "state MiB", "peak MiB", "sent MiB", "fill"]
    failed = [f"{name(c)}, {shape(c)}, {c['cell']['kernels']}: {c['status']}: {c['reason']}"
              for c in cells if c["status"] != "ok"]
    return [*(terminal.columns(names, rows) if rows else ()), *failed]


def table(cells: list[dict]) -> str:
    """Markdown: a line a cell; those without a result say why."""
    rows = ["| model | ZeRO file | ranks | rows | kernels | dtype | real tokens/s (min to max) | per device | "
            "labelled/s | step s | " + " / ".join(PARTS) + " % | MFU "
            "| state MiB (planned) | peak MiB | sent MiB/step | fill |",
            "|---|---|---:|---|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|"]
    for c in cells:
        head = f"| {c['cell']['preset']} | {stem(c)} | {c['cell']['ranks']} | {shape(c)} | {c['cell']['kernels']} |"
        if c["status"] != "ok":
            reason = c["reason"].replace("|", "\\|")
            rows.append(f"{head} | **{c['status']}**: {reason} |" + " |" * 9)
            continue
        split = c["split_s"]
        shares = " / ".join(f"{100 * split[part] / sum(split.values()):.0f}" for part in PARTS) if split else ""
        rows.append(
            f"{head} {c['dtype']} | {c['tokens_per_s']:,.0f} ({c['tokens_per_s_min']:,.0f} to "
            f"{c['tokens_per_s_max']:,.0f}) | {c['tokens_per_s_per_device']:,.0f} | "
            f"{c['labelled_tokens_per_s']:,.0f} | {c['step_s']:.3f} | {shares} | {c['mfu']:.1%} | "
            f"{state(c, 'held') / MB:,.0f} ({state(c, 'planned') / MB:,.0f}) | {peak(c) / MB:,.0f} | "
            f"{c['sent_bytes_per_step'] / MB:,.1f} | {c['packing_fill']:.2%} |")
    return "\n".join(rows)


def flat(value, at: str = "") -> dict:
    """A record as one row of a CSV: nested names joined by dots, lists by spaces."""
    if not isinstance(value, dict):
        return {at: " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value}
    return {name: leaf for key, inner in value.items()
            for name, leaf in flat(inner, f"{at}.{key}" if at else key).items()}
