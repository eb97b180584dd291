"""The mutable state of a training run: the engine, the request to stop, the watchdog, the pending checkpoint.

    live = LiveRun(engine=build_engine(prepared))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minimind_ds.checkpoint.async_save import AsyncSave
from minimind_ds.resilience.signals import StopRequest
from minimind_ds.resilience.watchdog import Watchdog
from minimind_ds.training.evaluations import Evaluations
from minimind_ds.training.spikes import SpikeDetector


@dataclass
class LiveRun:
    """The changing half of a run; PreparedRun is the other.

    engine: the DeepSpeed engine, None until it is built.  folder_lock: rank 0's hold on the run folder.  hosts: where
    each rank runs.  passed_over: names of the checkpoints after the one that this start went on from, until its first
    is written.  forward_s: seconds that this rank's forward passes took in the step before.  log: adds a line to
    the run's log.
    """

    engine: Any = None
    stop: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog | None = None
    spikes: SpikeDetector = field(default_factory=SpikeDetector)
    evaluations: Evaluations = field(default_factory=Evaluations)
    pending_save: AsyncSave | None = None
    folder_lock: Any = None
    hosts: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    forward_s: float = 0.0
    log: Callable[[str], None] = lambda line: None

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any; raises as AsyncSave.finish."""
        if self.pending_save is not None:
            self.pending_save.finish()
            self.pending_save = None

    def beat(self, doing: str) -> None:
        """Tell the watchdog, if there is one, what this rank does now."""
        if self.watchdog is not None:
            self.watchdog.beat(doing)
