"""A checkpoint on its way to disk while training goes on: a copy in memory now, files, hashes and the rename later.

The training loop waits for the copy only.  A thread of each rank writes and fsyncs that rank's files and hashes them;
rank 0's then commits, and all learn how it went from the process group's store.  Nothing of a checkpoint is in place
before everything of it is on disk, as if it had been written on the spot.

    python -m pytest tests/checkpoint/test_saving.py
"""

from __future__ import annotations

import copy
import hashlib
import json
import pathlib
import threading
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minimind_ds.distributed import malloc
from minimind_ds.distributed.torch_compat import default_store
from minimind_ds.io import fsync


def sha256(path: pathlib.Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def facts_of(path: pathlib.Path) -> dict:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def snapshot(value, copies: dict | None = None):
    """A copy that training cannot change: tensors in host memory, one copy each, containers of their kind."""
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key not in copies:
            # The original is kept beside its copy: no other tensor can take its place in memory meanwhile.
            # Pinned, a GPU's copy engine writes into it at the bus's speed; torch keeps such memory for the next time.
            copy_of = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            copies[key] = (value, copy_of.copy_(value.detach()))
        return copies[key][1]
    if isinstance(value, dict):
        made = copy.copy(value)
        for name, item in value.items():
            made[name] = snapshot(item, copies)
        return made
    if isinstance(value, list):
        return [snapshot(item, copies) for item in value]
    if isinstance(value, tuple):
        items = [snapshot(item, copies) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; earlier ones are untouched."""


class AsyncSave:
    """One checkpoint being written; `finish` waits for it and raises what went wrong, on every rank alike.

    Args:
        files: what this rank writes: (path, function that writes it).
        root: the folder they lie in.
        commit: for rank 0: called with every rank's {path under root: facts} when all files are on disk.
        what: for messages, such as "writing out/checkpoints/step_00000040".
    """

    def __init__(self, files: Sequence[tuple[pathlib.Path, Callable]], *, root: pathlib.Path,
                 commit: Callable[[dict], None], what: str):
        self.files, self.root, self.commit, self.what = files, root, commit, what
        self.rank, self.ranks, self.wrong = dist.get_rank(), dist.get_world_size(), None
        self.store = default_store()
        # Every rank saves the same checkpoints in the same order.
        self.number = self.store.add(f"saving/number of rank {self.rank}", 1)
        self.key = f"saving/{self.number}"
        self.thread = threading.Thread(target=self.run, name="saving", daemon=True)
        self.thread.start()

    def run(self) -> None:
        mine = {"files": {}, "wrong": None}
        try:
            for path, write in self.files:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
                fsync(path)
                mine["files"][path.relative_to(self.root).as_posix()] = facts_of(path)
        except Exception as error:  # noqa: BLE001  (a thread's errors are its owner's: finish raises them)
            mine["wrong"] = f"{type(error).__name__}: {error}"
        # Lets go of the copies.
        self.files = ()
        malloc.trim()
        try:
            self.store.set(f"{self.key}/{self.rank}", json.dumps(mine))
            if self.rank == 0:
                self.store.set(f"{self.key}/verdict", self.conclude())
            self.wrong = self.store.get(f"{self.key}/verdict").decode() or None
        except Exception as error:  # noqa: BLE001
            self.wrong = f"{self.what} failed: {type(error).__name__}: {error}"

    def conclude(self) -> str:
        """Rank 0: wait for all, commit; -> what went wrong, or nothing."""
        files = {}
        for rank in range(self.ranks):
            theirs = json.loads(self.store.get(f"{self.key}/{rank}"))
            if theirs["wrong"]:
                return f"{self.what} failed on rank {rank}: {theirs['wrong']}"
            files |= theirs["files"]
        # Whoever writes this one has read the verdict on the one before.
        for name in (*range(self.ranks), "verdict"):
            self.store.delete_key(f"saving/{self.number - 1}/{name}")
        try:
            self.commit(files)
        except Exception as error:  # noqa: BLE001
            return f"{self.what} failed on rank 0: {type(error).__name__}: {error}"
        return ""

    def finish(self) -> None:
        """Raises SaveFailed on every rank, naming the one where it did."""
        self.thread.join()
        if self.wrong:
            raise SaveFailed(self.wrong)
