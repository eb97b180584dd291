"""The table of every DeepSpeed key in ds_configs/README.md, made from what the code does.

    python -m tests.config.key_table        # writes it anew
"""

import os
import sys

from minimind_ds.config.deepspeed_keys import KEYS, SCHEMAS, inner_keys, schema_of
from minimind_ds.paths import DS_CONFIGS

README = DS_CONFIGS / "README.md"
BEGIN, END = "<!-- keys: python -m tests.config.key_table -->", "<!-- end of keys -->"


def of_schema(block: str) -> list[str]:
    """The keys of a block by DeepSpeed's schema, by the names that its documentation uses."""
    return [field.alias or name for name, field in schema_of(block).model_fields.items()]


def rows() -> list[tuple[str, str, str]]:
    """(keys, what becomes of them, why): the keys of a block that share the rest share a row."""
    found = {}
    for key, known in KEYS.items():
        block = key.rpartition(".")[0]
        found.setdefault((block, known.what, known.why), []).append(key.rpartition(".")[2])
    table = [(f"{block}." if block else "", what, why, names) for (block, what, why), names in found.items()]
    for block in SCHEMAS:
        names = [name for name in of_schema(block) if name not in inner_keys(block)]
        table.append((f"{block}.", KEYS[block].what if block in KEYS else "passed on",
                      "by DeepSpeed's own schema; \"auto\" means its default", names))
    return [(" ".join(f"`{block}{name}`" if i == 0 else f"`{name}`" for i, name in enumerate(names)), what, why)
            for block, what, why, names in table if names]


def table() -> str:
    lines = ["| key | here | |", "|---|---|---|", *(f"| {keys} | {what} | {why} |" for keys, what, why in rows())]
    return "\n".join(lines)


def in_readme() -> str:
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> int:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
