"""The files that --data_path names: paths, globs and folders, each with a share and a short name.

Without torch, so that a path that leads nowhere is told at once.

    python -c "import minimind_ds.data.files as f; print(f.expand(['examples/*.jsonl']))"
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import itertools
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from minimind_ds.config import untrusted
from minimind_ds.data.json_text import DataError

# What a folder is searched for; a file that is named itself may have any name.
DATA_ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".gz")
# A folder of datasets.save_to_disk is one data set; one of several splits is refused where it is read.
ONE_SET = ("state.json", "dataset_dict.json")
MOST_MATCHES = 100_000
KINDS_OF_FILE = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
                 stat.S_ISBLK: "a device"}


@dataclass(frozen=True)
class Source:
    """A data file, how often its samples are seen in an epoch, and a short name that no other source has."""

    path: Path
    share: float = 1.0
    name: str = ""


def expand(given: str | list) -> list[Source]:
    """The files that --data_path names: paths, globs and folders, those two in sorted order.

    Args:
        given: a path, or a list of paths and {"path", "share"}.

    Raises:
        DataError: nothing there, not a file, named twice.
    """
    sources: list[Source] = []
    for entry in [given] if isinstance(given, str) else given:
        path, share = (entry["path"], entry.get("share", 1)) if isinstance(entry, dict) else (entry, 1)
        sources += [Source(found, float(share)) for found in find(path)]
    # Path.resolve raises on links in a circle.
    seen = Counter(os.path.realpath(source.path) for source in sources)
    for source in sources:
        if seen[os.path.realpath(source.path)] > 1:
            raise DataError(f"{source.path} is named twice; a share of 2, in a run file's data_path, has each of its "
                            "samples seen twice an epoch")
    names = short_names([source.path for source in sources])
    return [dataclasses.replace(source, name=name) for source, name in zip(sources, names)]


def find(path: str) -> list[Path]:
    """The data files of a path, a glob or a folder."""
    if not path:
        raise DataError("a data path is empty: is a variable not set?")
    mode = mode_of(Path(path))
    if mode is None and glob.has_magic(path):
        # A pattern may match a whole disk.
        matches = list(itertools.islice(glob.iglob(path, recursive=True), MOST_MATCHES + 1))
        if len(matches) > MOST_MATCHES:
            raise DataError(f"{untrusted.shown_path(path)} matches more than {MOST_MATCHES:,} files")
        found = [file for match in sorted(matches) for file in in_folder(Path(match))]
        if not found:
            hint = "; in a pattern, [[] stands for [" * ("[" in path)
            raise DataError(f"{untrusted.shown_path(path)} matches no file{hint}")
        return found
    if mode is None:
        parts = [part.strip() for part in path.split(",")]
        hint = "; several files are separated by spaces" if len(parts) > 1 and all(map(os.path.exists, parts)) else ""
        shared = re.fullmatch(r"(.+)[:=@][\d.]+", path)
        if shared and os.path.exists(shared[1]):
            hint = "; a share stands in a run's YAML, data_path: [{path: FILE, share: 2}]"
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        hint = hint or like(Path(path))
        raise DataError(f"{untrusted.shown_path(path)} does not exist{where}{hint}")
    if stat.S_ISDIR(mode) and not (found := in_folder(Path(path))):
        raise DataError(f"the folder {path} holds no data file ({', '.join(DATA_ENDINGS)})")
    return found if stat.S_ISDIR(mode) else [Path(path)]


def like(path: Path, endings: str | tuple[str, ...] = DATA_ENDINGS) -> str:
    """'; did you mean data/sft.jsonl?', of the files with such endings beside a path that is not there, or nothing."""
    beside = [name for name in os.listdir(path.parent) if name.endswith(endings)] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside[:MOST_MATCHES], n=1)
    return f"; did you mean {untrusted.shown_path(str(path.parent / close[0]))}?" if close else ""


def mode_of(path: Path) -> int | None:
    """What is at the path, as in os.stat_result; None: nothing.

    Raises:
        DataError: something that is neither a file nor a folder, or that cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    # ValueError: a zero byte in the name.
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)[:200]!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for is_it, what in KINDS_OF_FILE.items():
        if is_it(mode):
            raise DataError(f"{path} is {what}; data is read more than once and has to be a file")
    return mode


def in_folder(path: Path, above: tuple[str, ...] = (), others: list[Path] | None = None) -> list[Path]:
    """The path, if it is a file or one data set; else the data files below it, sorted.

    above: real paths of the folders that it lies in; a link back to one of them is not followed.
    others: takes the files that are passed over because of their ending.
    """
    if not os.path.isdir(path) or any(os.path.isfile(path / name) for name in ONE_SET):
        return [path]
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"the folder {path} cannot be read: {error.strerror}") from None
    found, above = [], (*above, os.path.realpath(path))
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # Unlike Path.is_dir, False for what may not be looked at.
        if os.path.isdir(entry):
            found += in_folder(entry, above, others) if os.path.realpath(entry) not in above else []
        elif entry.name.endswith(DATA_ENDINGS) and mode_of(entry):
            found.append(entry)
        elif others is not None:
            others.append(entry)
    return found


def passed_over(given: str | list) -> list[str]:
    """What a run says of files in --data_path's folders that are not read because of their ending."""
    lines = []
    for entry in given if isinstance(given, list) else [given]:
        folder, others = Path(entry["path"] if isinstance(entry, dict) else entry), []
        if os.path.isdir(folder):
            in_folder(folder, others=others)
        if others:
            listed = ", ".join(other.name for other in others[:5]) + ", ..." * (len(others) > 5)
            lines.append(f"the folder {folder} holds {len(others):,} files that are not read, since they do not end "
                         f"in {', '.join(DATA_ENDINGS)}: {listed}")
    return lines


def short_names(paths: list[Path]) -> list[str]:
    """The files' names without their ending; where two are alike, with as many folders as tell them apart."""
    stems = [path.with_name(path.name.split(".")[0] or path.name) for path in paths]
    depth = 1
    while True:
        names = ["/".join(stem.parts[-depth:]) for stem in stems]
        if len(set(names)) == len(names) or depth > max(len(stem.parts) for stem in stems):
            break
        depth += 1
    count = Counter(names)
    return [name if count[name] == 1 else "/".join(path.parts[-depth:]) for name, path in zip(names, paths)]
