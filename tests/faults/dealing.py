"""Which faults meet which run, and at which of its steps: dealt from a seed, so that a deal can be played again."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

HUNG = "hung rank"
# What ends a start; the next start goes on.  Those that the launcher takes 30 s to clean up come less often.
ENDS = ("rank killed", "power cut", "killed while saving", "SIGTERM", "SIGUSR1", "disk full", "EIO on write",
        "EIO on fsync", HUNG)
# What happens to the newest checkpoint, and to the pointer, between two starts.
DAMAGES = ("file cut", "bit flipped", "file deleted")
POINTERS = ("latest names nothing", "latest empty", "latest binary")
# What a start has to live through.
SLOW, SECOND = "slow rank", "second job"

LEAST_STEPS, EVERY = 48, 4


@dataclass(frozen=True)
class Configuration:
    """What is trained: all weights or adapters, with experts, or rows, whole on each rank or shared by both."""

    stage: int
    moe: bool
    lora: bool = False
    experts: bool = False
    rows: bool = False

    @property
    def name(self) -> str:
        further = [word for word, has in (("lora", self.lora), ("experts", self.experts), ("rows", self.rows)) if has]
        return "-".join([f"zero{self.stage}", "moe" if self.moe else "dense", *further])

    @property
    def keys(self) -> dict:
        """Of the DeepSpeed JSON, beside the stage's."""
        shared = {"expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe"}}
        return {**(shared if self.experts else {}), **({"sequence_parallel_size": 2} if self.rows else {})}

    @property
    def dtype(self) -> str:
        return "bf16" if self.moe else "fp32"


ALL = [Configuration(stage, moe) for stage in range(4) for moe in (False, True)]
ALL += [Configuration(stage, moe, lora=True) for stage in (2, 3) for moe in (False, True)]
ALL += [Configuration(stage, True, experts=True) for stage in (2, 3)]
ALL += [Configuration(stage, False, rows=True) for stage in (0, 2, 3)]
ALL += [Configuration(1, True, experts=True, rows=True)]


@dataclass
class Start:
    """The faults of one start: `during` it and at its `end` as (step, kind), and those `between` it and the next."""

    during: list[tuple[int, str]] = field(default_factory=list)
    end: tuple[int, str] | None = None
    between: list[str] = field(default_factory=list)


def deal(faults: int, seed: int, configurations: list[Configuration], missing: set[str]) -> dict[str, list[Start]]:
    """A list of starts for each configuration, by name; the last start of each runs to its end.

    Args:
        faults: how many in all.
        missing: kinds that this machine cannot do.
    """
    draw = random.Random(seed)
    ends = rounds(draw, [kind for kind in ENDS if kind not in missing and kind != HUNG],
                  [kind for kind in ENDS if kind not in missing])
    damages, pointers = rounds(draw, DAMAGES), rounds(draw, POINTERS)
    shares = [faults // len(configurations) + (i < faults % len(configurations)) for i in range(len(configurations))]
    hands = {}
    for configuration, share in zip(configurations, shares):
        stops = min(share, max(1, (share - 3) // 2))
        steps = steps_for(share)
        at = sorted(draw.sample(range(3, steps - 2 * EVERY), stops))
        starts = [Start(end=(step, next(ends))) for step in at] + [Start()]
        slots = [(i, kinds) for i in range(stops) for kinds in (damages, pointers)]
        slots += [(i, SLOW) for i in range(stops + 1)] + [(draw.randrange(stops + 1), SECOND)]
        for i, what in draw.sample(slots, share - stops):
            if what in (SLOW, SECOND):
                first, last = ([0] + at)[i] + 1, (at + [steps - 3])[i]
                starts[i].during.append((draw.randint(first, last), what))
            else:
                starts[i].between.append(next(what))
        for start in starts:
            start.during.sort()
        hands[configuration.name] = starts
    return hands


def steps_for(share: int) -> int:
    """Optimizer steps of a run that meets so many faults."""
    return max(LEAST_STEPS, 4 * share)


def rounds(draw: random.Random, *kinds):
    """Each kind once, in some order, and again; with several lists of kinds, from one after the other."""
    for these in itertools.cycle(kinds):
        yield from draw.sample(list(these), len(these))
