"""Parquet and Arrow files -> raw records, one at a time, with pyarrow.

    python -m pytest tests/data/test_readers.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from minimind_ds.config.errors import UserError
from minimind_ds.data.json_text import MAX_LINE_BYTES, DataError, letters, reason

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
ROWS = 256


def rows(paths: list[Path], read: Callable[[int], None],
         shown: list[str] | None = None) -> Iterator[tuple[int, int, dict]]:
    """Each record with its number, from 1 over all files.

    Args:
        read: told the bytes of each file when all of it is read.
        shown: the columns that count; None: all.

    Raises:
        DataError: a damaged file, or a value that cannot be read.
    """
    import pyarrow

    number = 0
    for path in paths:
        try:
            for batch in _batches(path):
                for row in range(batch.num_rows):
                    # One by one: a dictionary's value may be short in the file and stand in every row.
                    record = _as_json({name: column[row].as_py(maps_as_pydicts="strict")
                                       for name, column in zip(batch.schema.names, batch.columns)
                                       if shown is None or name in shown})
                    if letters(record) > MAX_LINE_BYTES:
                        raise DataError(f"{path} record {number + 1} is longer than {MAX_LINE_BYTES >> 20} MiB")
                    number += 1
                    yield number, 0, record
            read(path.stat().st_size)
        except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as err:
            raise DataError(f"{path} is damaged, after record {number}: {reason(err)}") from None
        except UserError:
            raise
        except (ArithmeticError, KeyError, ValueError, RecursionError) as err:
            # A date of the year 10000 within a turn, a map that has a key twice, a decimal of flipped bits.
            raise DataError(f"{path} holds what cannot be read, after record {number}: {reason(err)}") from None


def _batches(path: Path) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        head = file.read(len(ARROW_FILE))
        file.seek(0)
        if head.startswith(PARQUET):
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(ROWS, use_threads=False)
        elif head.startswith(ARROW_FILE):
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            # Arrow trusts the offsets in a file, and would read beyond its end.
            batch.validate(full=True)
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise DataError(f"{path} has two columns of one name ({', '.join(map(ascii, names))[:200]})")
            yield pyarrow.RecordBatch.from_arrays([_timeless(column) for column in batch.columns], names)


def _timeless(column: Any) -> Any:
    """Dates and times as plain numbers: they mean nothing here, and Python does not have all of them."""
    import pyarrow

    if not pyarrow.types.is_temporal(column.type) or pyarrow.types.is_interval(column.type):
        return column
    return column.view(pyarrow.int64() if column.type.bit_width == 64 else pyarrow.int32())


def _as_json(value: Any) -> Any:
    """What JSON has in its place, so that a label of bytes or decimals is known for what it is.

    Columns give every object all the keys that any has, so a null here is a key that is not there.
    """
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_as_json(part) for part in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, bytes):
        # Text of writers that do not mark it as such; of a picture, which is no UTF-8, nothing is read.
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Decimal):
        number = float(value)
        return int(value) if number.is_integer() and abs(number) < 1 << 53 else number
    # An interval, a UUID, a date within a turn.
    return value.item() if hasattr(value, "item") else str(value)
