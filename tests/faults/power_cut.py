"""What a disk may hold when the power goes, at any moment of a run: its calls, recorded by strace, replayed so far.

A disk owes nothing but what was fsynced: until then each write and each change of a folder may be there or not, in
any combination.  `kill -9` is the mild case: everything the calls before it did is there.

    python -m pytest tests/checkpoint/test_power_cut.py
"""

from __future__ import annotations

import pathlib
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

CALLS = ("open", "openat", "creat", "lseek", "write", "writev", "pwrite64", "pwritev", "sendfile", "copy_file_range",
         "ftruncate", "truncate", "fallocate", "mmap", "fsync", "fdatasync", "rename", "renameat", "renameat2",
         "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "link", "linkat", "symlink", "symlinkat")
LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)(?:<|$| )", re.DOTALL)
STRING = r'"((?:\\x[0-9a-f]{2})*)"'


def missing() -> str | None:
    """Why nothing can be recorded here; None when it can."""
    if shutil.which("strace") is None:
        return "no strace: apt-get install --no-install-recommends strace"
    tried = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"no strace here: {tried.stderr.strip()}" if tried.returncode else None


def recorded(log: pathlib.Path, command: list[str]) -> list[str]:
    """The command, under strace."""
    return ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", "100000000", "-e", "signal=none", "-e",
            "trace=" + ",".join(f"?{name}" for name in CALLS), "-o", str(log), *command]


@dataclass(eq=False)
class File:
    """Bytes, those that are sure to be on the disk, and the writes since then as (offset, bytes)."""

    now: bytes = b""
    sure: bytes = b""
    since: list[tuple[int, bytes]] = field(default_factory=list)
    position: int = 0

    def write(self, at: int, data: bytes) -> None:
        self.now = patched(self.now, at, data)
        self.since.append((at, data))


@dataclass(eq=False)
class Folder:
    now: dict = field(default_factory=dict)
    sure: dict = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Change:
    """A change of folders that is there wholly or not at all: entries that it sets, None for one that it removes."""

    entries: tuple[tuple[Folder, str, File | Folder | None], ...]


def patched(data: bytes, at: int, more: bytes) -> bytes:
    return data[:at].ljust(at, b"\0") + more + data[at + len(more):]


class Disk:
    """The files below `root`, which is empty at first and itself sure to be there."""

    def __init__(self, root: pathlib.Path):
        self.root, self.top, self.changes = root, Folder(), []

    def apply(self, call: tuple) -> None:
        """One call, as `calls` gives it."""
        name, *args = call
        getattr(self, name)(*args)

    def at(self, path: str) -> File | Folder | None:
        node = self.top
        for part in pathlib.Path(path).relative_to(self.root).parts:
            node = node.now.get(part) if isinstance(node, Folder) else None
        return node

    def entry(self, path: str, node: File | Folder | None) -> tuple:
        return self.at(str(pathlib.Path(path).parent)), pathlib.Path(path).name, node

    def change(self, *entries: tuple) -> None:
        for folder, name, node in entries:
            folder.now.pop(name, None)
            if node is not None:
                folder.now[name] = node
        self.changes.append(Change(entries))

    def open(self, path: str, create: bool, cut: bool) -> None:
        node = self.at(path)
        if node is None and create:
            node = File()
            self.change(self.entry(path, node))
        if isinstance(node, File):
            node.position = 0
            if cut:
                self.truncate(path, 0)

    def seek(self, path: str, to: int) -> None:
        if isinstance(node := self.at(path), File):
            node.position = to

    def write(self, path: str, data: bytes, at: int | None) -> None:
        """at: None for where the file is, -1 for its end."""
        node = self.at(path)
        if node is None:
            # Deleted while it was open.
            return
        start = {None: node.position, -1: len(node.now)}.get(at, at)
        node.write(start, data)
        if at is None or at == -1:
            node.position = start + len(data)

    def truncate(self, path: str, size: int) -> None:
        # The worst case: what was cut away is gone at once, what was to come instead is not yet there.
        node = self.at(path)
        node.now = node.sure = node.now[:size].ljust(size, b"\0")
        node.since = []

    def fsync(self, path: str) -> None:
        node = self.at(path)
        if isinstance(node, File):
            node.sure, node.since = node.now, []
        elif isinstance(node, Folder):
            mine = [change for change in self.changes if any(folder is node for folder, *_ in change.entries)]
            self.changes = [change for change in self.changes if change not in mine]
            for change in mine:
                settle(change, None)

    def rename(self, old: str, new: str) -> None:
        node = self.at(old)
        self.change(self.entry(old, None), self.entry(new, node))

    def remove(self, path: str) -> None:
        self.change(self.entry(path, None))

    def mkdir(self, path: str) -> None:
        self.change(self.entry(path, Folder()))

    def left(self, kind: str, draw: random.Random) -> dict[str, bytes | None]:
        """What may be there after a power cut now: bytes by path below the root, None for a folder.

        Args:
            kind: "all" of what no fsync has covered is there; "none"; "folders", but no file's bytes;
                "some" of it by chance.
        """
        entries = {}
        for change in self.changes:
            if kind in ("all", "folders") or (kind == "some" and draw.random() < 0.5):
                settle(change, entries)
        found = {}

        def walk(folder: Folder, under: str) -> None:
            for name, node in sorted(entries.get(folder, folder.sure).items()):
                path = f"{under}{name}"
                if isinstance(node, Folder):
                    found[path] = None
                    walk(node, path + "/")
                elif kind == "all":
                    found[path] = node.now
                else:
                    found[path] = node.sure
                    for at, data in node.since if kind == "some" else ():
                        if draw.random() < 0.5:
                            found[path] = patched(found[path], at, data)
        walk(self.top, "")
        return found


def settle(change: Change, entries: dict | None) -> None:
    """A change has reached the disk; with `entries`, a copy of it that is made there, folder by folder."""
    for folder, name, node in change.entries:
        there = entries.setdefault(folder, dict(folder.sure)) if entries is not None else folder.sure
        there.pop(name, None)
        if node is not None:
            there[name] = node


def calls(log: pathlib.Path, root: pathlib.Path) -> Iterator[tuple]:
    """The calls of a strace log that changed something below root, as Disk.apply takes them, in order."""
    unfinished, appending = {}, {}
    with log.open(encoding="ascii") as lines:
        for line in lines:
            thread, _, rest = line.rstrip("\n").partition(" ")
            if rest.endswith("<unfinished ...>"):
                unfinished[thread] = line.rstrip("\n").removesuffix("<unfinished ...>")
                continue
            if "resumed>" in rest[:60]:
                line = unfinished.pop(thread) + rest.split("resumed>", 1)[1]
            found = LINE.match(line.rstrip("\n"))
            if found and int(found[4]) >= 0:
                yield from understood(found[2], found[3], int(found[4]), str(root), appending)


def text(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


def understood(name: str, args: str, result: int, root: str, appending: dict) -> Iterator[tuple]:
    """One call's line of strace.  Raises NotImplementedError for one that changes files in a way not known here."""
    paths = [text(p).decode() for p in re.findall(r"<((?:\\x[0-9a-f]{2})+)>", args)]
    if name in ("open", "openat", "creat", "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "rename", "renameat",
                "renameat2", "truncate", "link", "linkat", "symlink", "symlinkat"):
        named = [text(p).decode(errors="replace") for p in re.findall(STRING, args)]
        bases = (paths + [""] * len(named)) if "at" in name[4:] else [""] * len(named)
        named = [str(pathlib.Path(base, word)) for base, word in zip(bases, named)]
        if not any(inside(word, root) for word in named):
            return
        if name in ("open", "openat", "creat"):
            appending[named[0]] = "O_APPEND" in args
            if name == "creat" or re.search(r"O_WRONLY|O_RDWR", args):
                yield "open", named[0], name == "creat" or "O_CREAT" in args, name == "creat" or "O_TRUNC" in args
        elif name.startswith("mkdir"):
            yield "mkdir", named[0]
        elif name.startswith(("unlink", "rmdir")):
            yield "remove", named[0]
        elif name.startswith("rename"):
            yield "rename", *named
        else:
            raise NotImplementedError(f"{name}({args[:300]})")
        return
    # What it copies to, where it has two.
    path = paths[-1 if name == "copy_file_range" else 0] if paths else ""
    if not inside(path, root):
        return
    if name in ("fsync", "fdatasync"):
        yield "fsync", path
    elif name == "lseek":
        yield "seek", path, result
    elif name in ("write", "writev"):
        data = b"".join(text(part) for part in re.findall(STRING, args))[:result]
        yield "write", path, data, -1 if appending.get(path) else None
    elif name == "pwrite64":
        yield "write", path, text(re.search(STRING, args)[1]), int(args.rsplit(", ", 1)[1])
    elif name == "sendfile":
        start = int(re.search(r"\[(\d+)\]", args)[1])
        yield "write", path, pathlib.Path(paths[1]).read_bytes()[start:start + result], None
    elif name == "ftruncate":
        yield "truncate", path, int(args.rsplit(", ", 1)[1])
    elif name == "mmap" and not ("MAP_SHARED" in args and "PROT_WRITE" in args):
        return
    else:
        raise NotImplementedError(f"{name}({args[:300]})")


def inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")
