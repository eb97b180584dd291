"""Every start of a run and how it ended: starts.json in the run folder, for the report; nothing else reads it.

    python -c "import json; print([start.get('end') for start in json.load(open('out/starts.json'))['starts']])"
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import resource
import socket
import time
from collections.abc import Callable
from importlib import metadata

import psutil
import torch
import torch.distributed as dist

from minimind_ds import __version__
from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.distributed.engine import NonFinite
from minimind_ds.io import write_file
from minimind_ds.resilience import restarts
from minimind_ds.resilience.signals import Stopped
from minimind_ds.training.prepare import PreparedRun
from minimind_ds.training.resume import ResumePoint

REPORT = "report.html"
# Of a run that a batch system starts over and over.
MOST_STARTS = 200


def read(folder: pathlib.Path) -> list[dict]:
    """The starts that the folder tells of, oldest first.

    Raises:
        UserError: starts.json is missing or damaged.
    """
    found = untrusted.read_json(folder / "starts.json").get("starts")
    if not isinstance(found, list) or not all(isinstance(start, dict) for start in found):
        raise UserError(f"{folder / 'starts.json'} holds no list of starts")
    return found


class Recorded:
    """Around the training: notes its beginning and its end, on rank 0.  A run never fails by it."""

    def __init__(self, prepared: PreparedRun, start: ResumePoint):
        self.prepared, self.start = prepared, start
        self.active, self.starts = prepared.world.rank == 0 and not start.finished, []
        # A run that was told to start over has no past; one that was killed before its first checkpoint has.
        self.over = start.path is None and prepared.run.from_resume != "auto"

    def __enter__(self) -> None:
        if not self.active:
            return
        if self.over:
            with contextlib.suppress(OSError):
                (self.prepared.folder / REPORT).unlink(missing_ok=True)
        else:
            with contextlib.suppress(UserError):
                self.starts = read(self.prepared.folder)[1 - MOST_STARTS:]
        self.starts.append({"began": time.time(), **self.facts()})
        self.write()

    def __exit__(self, kind, error, trace) -> None:
        if not self.active:
            return
        end = {"end": "finished"}
        if isinstance(error, Stopped):
            end = {"end": "stopped", "end_step": error.step, "planned": error.planned}
        elif error is not None:
            end = {"end": "failed", "error": f"{kind.__name__}: {error}"[:500]}
        self.starts[-1] |= {"ended": time.time(), **end, "peak_bytes": self.peak()}
        self.write()

    def write(self) -> None:
        # A full disk is the training's to report.
        with contextlib.suppress(OSError):
            write_file(self.prepared.folder / "starts.json", json.dumps({"starts": self.starts}, indent=1) + "\n")

    def facts(self) -> dict:
        """What the run is on, and what the planner needs to know of it."""
        prepared, start, device = self.prepared, self.start, self.prepared.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        again = 0 if self.over else max(0, restarts.last_step(prepared.folder) - start.step)
        return {"step": start.step, "steps_again": again, "total_steps": prepared.total_steps, "kind": prepared.kind,
                "host": socket.gethostname(), "ranks": prepared.world.size, "device": device.type, "name": name,
                "minimind_ds": __version__, "torch": torch.__version__, "deepspeed": metadata.version("deepspeed"),
                "kernels": prepared.kernels.reason, "activation_bytes": prepared.kernels.activations.itemsize,
                "sequence": prepared.dims.sequence, "experts": prepared.dims.experts,
                "model": prepared.model_config.to_dict(), "bytes_before": self.before()}

    def before(self) -> int:
        """Bytes that the process held before it had an engine: with those, a CPU's peak is the training's."""
        return psutil.Process().memory_info().rss if self.prepared.world.device.type == "cpu" else 0

    def peak(self) -> int:
        """The most bytes of this rank's device at once: PyTorch's on a GPU, the whole process's on a CPU."""
        device = self.prepared.world.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class AtEnd:
    """Around the training and all that notes its end: calls `at_end(prepared)` on rank 0, which raises nothing."""

    def __init__(self, prepared: PreparedRun, start: ResumePoint, at_end: Callable[[PreparedRun], None] | None):
        self.prepared, self.at_end = prepared, None if start.finished else at_end

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if self.at_end and self.prepared.world.rank == 0:
            self.at_end(self.prepared)
        if self.at_end and (kind is None or issubclass(kind, (Stopped, NonFinite))):
            # All ranks end alike: a launcher ends this one as soon as another has left with a code of its own.
            dist.barrier()
