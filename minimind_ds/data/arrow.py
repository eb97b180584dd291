"""Parquet and Arrow files -> raw records, a few hundred at a time, with pyarrow.

    python -m pytest tests/data/test_readers.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minimind_ds.config.errors import UserError
from minimind_ds.data.json_text import DataError, reason

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
ROWS = 256


def rows(paths: list[Path], read: Callable[[int], None]) -> Iterator[tuple[int, int, dict]]:
    """Each record with its number, from 1 over all files.

    Args:
        read: told the bytes of each file when all of it is read.

    Raises:
        DataError: a damaged file, or a value that cannot be read.
    """
    import pyarrow

    number = 0
    for path in paths:
        try:
            for batch in _batches(path):
                for start in range(0, batch.num_rows, ROWS):
                    for row in batch.slice(start, ROWS).to_pylist(maps_as_pydicts="strict"):
                        number += 1
                        yield number, 0, _without_nulls(row)
            read(path.stat().st_size)
        except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as err:
            raise DataError(f"{path} is damaged, after record {number}: {reason(err)}") from None
        except UserError:
            raise
        except (OverflowError, KeyError, ValueError) as err:
            # A date of the year 10000 within a turn, a map that has a key twice.
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


def _without_nulls(value: Any) -> Any:
    """Columns give every object all the keys that any has, so a null here is a key that is not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
