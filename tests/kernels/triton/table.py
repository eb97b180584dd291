"""The table of compiled kernels in docs/KERNELS.md, for the Triton of constraints.txt.

    python -m tests.kernels.triton.table            prints it
    python -m tests.kernels.triton.table --write    puts it into the page
"""

import pathlib
import re
import sys

from . import ROOT, compiled

PAGE = ROOT / "docs" / "KERNELS.md"
BEGIN, END = "<!-- compiled: python -m tests.kernels.triton.table --write -->\n", "<!-- end of compiled -->\n"
# What starts every kernel at MiniMind-3's sizes.
SOURCES = ("test_triton_aot:default", "test_triton_aot:elementwise", "test_triton_moe:launches")


def tile(constants: dict) -> str:
    """Rows x columns (x depth) of a kernel's tile, where it has one."""
    if "KEYS" in constants:
        return f"{constants['BLOCK'] * constants.get('HEADS', 1)} × {constants['KEYS']}"
    if "DEPTH" in constants:
        return f"{constants['ROWS']} × {constants['COLUMNS']} × {constants['DEPTH']}"
    return str(constants.get("ROWS", constants.get("BLOCK", "")))


def row(found: dict) -> str:
    counts = found["counts"]
    matrix = " ".join(f"{counts[name]} {name}" for name in ("HGMMA", "HMMA") if counts[name])
    spilled = counts["STL"] + counts["LDL"]
    return (f"| sm_{found['arch']} | `{found['kernel']}` | {tile(found['constants'])} | {found['warps']}, "
            f"{found['stages']} | {found['registers']} | {spilled} | {found['shared']:,} | {matrix} | "
            f"{found['blocks_per_sm']} |")


def table(found: list[dict]) -> str:
    """Markdown; half precision only, a kernel's equal rows once."""
    rows = dict.fromkeys(row(one) for one in found if one["dtypes"][0] == "bfloat16")
    return "\n".join(["| target | kernel | tile | warps, stages | registers | spilled | shared, bytes | matrix | "
                      "blocks an SM |", "|---|---|---|---|---:|---:|---:|---|---:|", *rows]) + "\n"


def on_the_page() -> str:
    return re.search(re.escape(BEGIN) + r"(.*?)" + re.escape(END), PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


def main() -> None:
    made = table([one for arch in (90, 80) for source in SOURCES for one in compiled(source, arch)])
    if "--write" not in sys.argv:
        print(made)
        return
    text = PAGE.read_text(encoding="utf-8")
    pathlib.Path(PAGE).write_text(text.replace(BEGIN + on_the_page() + END, BEGIN + made + END), encoding="utf-8")


if __name__ == "__main__":
    main()
