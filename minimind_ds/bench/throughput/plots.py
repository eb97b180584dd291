"""The sweep's pictures.  Imported only where matplotlib is installed.

    python launch/benchmark.py --report
"""

from __future__ import annotations

import itertools
import pathlib

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

from minimind_ds.bench.throughput.report import KINDS, MB, shape, stem  # noqa: E402
from minimind_ds.bench.throughput.watch import PARTS  # noqa: E402


def draw(cells: list[dict], folder: pathlib.Path) -> list[pathlib.Path]:
    """Four PNGs; a picture that would be empty is left out."""
    ok = [c for c in cells if c["status"] == "ok"]
    pictures = {"throughput": (tokens_by_file, ok), "memory": (memory_by_file, ok),
                "scaling": (scaling, [c for c in ok if len(rank_counts(ok, c)) > 1]),
                "step": (step_parts, [c for c in ok if c["split_s"]])}
    written = []
    for name, (picture, of) in pictures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if of:
            figure = picture(of)
            figure.savefig(path, dpi=120)
            pyplot.close(figure)
            written.append(path)
    return written


def series(cell: dict, *, ranks: bool = True) -> str:
    """What a line or a colour stands for: everything but the ZeRO file (and the ranks)."""
    c = cell["cell"]
    kernels = "" if c["kernels"] == "auto" else f" {c['kernels']}"
    words = f", {c['ranks']} rank{'s' * (c['ranks'] > 1)}" if ranks else ""
    return f"{c['preset']} {shape(cell)}{kernels} {cell['dtype']}{words}"


def label(preset: str, *words: str) -> str:
    """In a panel that is titled with the preset."""
    return " ".join(words).replace(f"{preset} ", "", 1)


def rank_counts(cells: list[dict], cell: dict) -> set[int]:
    same = (stem(cell), series(cell, ranks=False))
    return {c["cell"]["ranks"] for c in cells if (stem(c), series(c, ranks=False)) == same}


def panels(cells: list[dict], of, *, height: float = 3.6):
    """A panel for each value of `of`, one above the other: models of different size share no axis."""
    names = list(dict.fromkeys(map(of, cells)))
    figure, axes = pyplot.subplots(len(names), 1, figsize=(9, height * len(names)), squeeze=False,
                                   layout="constrained")
    return figure, [(name, axis, [c for c in cells if of(c) == name]) for name, axis in zip(names, axes[:, 0])]


def tokens_by_file(cells: list[dict]):
    figure, parts = panels(cells, lambda c: c["cell"]["preset"])
    for preset, axis, mine in parts:
        files, lines = list(dict.fromkeys(map(stem, mine))), list(dict.fromkeys(map(series, mine)))
        width = 0.8 / len(lines)
        for i, line in enumerate(lines):
            chosen = [c for c in mine if series(c) == line]
            at = [files.index(stem(c)) + (i - (len(lines) - 1) / 2) * width for c in chosen]
            rate = [c["tokens_per_s"] for c in chosen]
            spread = [[r - c["tokens_per_s_min"] for r, c in zip(rate, chosen)],
                      [c["tokens_per_s_max"] - r for r, c in zip(rate, chosen)]]
            axis.bar(at, rate, width, yerr=spread, capsize=3, label=label(preset, line))
        axis.set(title=preset, ylabel="real tokens/s, all ranks", xticks=range(len(files)), xticklabels=files)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def memory_by_file(cells: list[dict]):
    """Planned beside measured, a rank's training state by kind."""
    figure, parts = panels(cells, lambda c: series(c))
    for name, axis, mine in parts:
        files = list(dict.fromkeys(map(stem, mine)))
        last = {stem(c): c for c in mine}
        colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
        top = max(sum(c["memory"][which].values()) for c in last.values() for which in ("planned", "held")) / MB
        for offset, which, hatch in ((-0.2, "planned", "//"), (0.2, "held", None)):
            bottom = [0.0] * len(files)
            for kind, colour in zip(KINDS, colours):
                heights = [last[f]["memory"][which].get(kind, 0) / MB for f in files]
                # What could not be seen needs no colour.
                if max(heights) > 0.01 * top:
                    axis.bar([i + offset for i in range(len(files))], heights, 0.36, bottom=bottom, color=colour,
                             hatch=hatch, edgecolor="white",
                             label=f"{kind}, {'planned' if which == 'planned' else 'measured'}")
                bottom = [b + h for b, h in zip(bottom, heights)]
        axis.set_ylim(0, 1.08 * top)
        axis.set(title=name, ylabel="MiB on a rank", xticks=range(len(files)), xticklabels=files)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def scaling(cells: list[dict]):
    """Tokens/s over ranks, rows a rank fixed; the dotted line is the first point times ranks."""
    figure, parts = panels(cells, lambda c: c["cell"]["preset"])
    for preset, axis, mine in parts:
        lines = dict.fromkeys((stem(c), series(c, ranks=False)) for c in mine)
        for colour, line in zip(itertools.cycle(pyplot.rcParams["axes.prop_cycle"].by_key()["color"]), lines):
            points = sorted((c["cell"]["ranks"], c["tokens_per_s"]) for c in mine
                            if (stem(c), series(c, ranks=False)) == line)
            x, y = zip(*points)
            axis.plot(x, y, "o-", color=colour, label=label(preset, *line))
            axis.plot(x, [y[0] / x[0] * n for n in x], ":", color=colour)
        axis.set(title=preset, xlabel="ranks", ylabel="real tokens/s")
        axis.set_xticks(sorted({c["cell"]["ranks"] for c in mine}))
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def step_parts(cells: list[dict]):
    figure, parts = panels(cells, lambda c: c["cell"]["preset"], height=1.5 + 0.3 * len(cells))
    for preset, axis, mine in parts:
        labels = [label(preset, stem(c), series(c)) for c in mine]
        left = [0.0] * len(mine)
        for part in PARTS:
            widths = [c["split_s"][part] for c in mine]
            axis.barh(range(len(mine)), widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths)]
        axis.set(title=preset, xlabel="seconds of a step taken apart", yticks=range(len(mine)), yticklabels=labels)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
