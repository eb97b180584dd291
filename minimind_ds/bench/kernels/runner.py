"""One group of checks, in the process that was started for it; each result is on disk before the next begins.

    python launch/check_kernels.py OUT_DIR --parts correctness --groups attention
"""

from __future__ import annotations

import functools
import json
import pathlib
import signal
import time
import traceback
from collections.abc import Iterable

from minimind_ds.bench.supervise import DEVICE_BROKE, write

# Seconds that one check may take, compiling its kernels included; the interpreter's are none of the device's.
LIMIT, LIMIT_SMALL = 100, 300
# Faults after which nothing more runs in this process.
BROKEN = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure", "cudaError")


def run_group(part: str, name: str, file: pathlib.Path, *, small: bool, without: tuple[str, ...]) -> int:
    """Runs what the file has no record of yet.  -> 0, or DEVICE_BROKE."""
    import torch
    import triton

    from .items import Setting, items, rate_of

    if triton.knobs.runtime.interpret:
        if not interpreted(part, name, file):
            return 0
    elif not torch.cuda.is_available():
        raise RuntimeError("no GPU, and TRITON_INTERPRET is not 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(device, small, without)
    rates = functools.partial(rate_of, torch.bfloat16, setting) if part == "timings" else None
    return run_items(items(part, name, setting), part, file, LIMIT_SMALL if small else LIMIT, rates)


def interpreted(part: str, name: str, file: pathlib.Path) -> bool:
    """From here on this process interprets kernels; False, and the file says why, where nothing can."""
    from minimind_ds.bench.kernels import interpretable

    if reason := interpretable.why_not():
        print(f"   left out: {part}: {name}: {reason}", flush=True)
        write(file, {"records": [{"item": "interpreter", "op": "interpreter", "ours": True, "status": "absent",
                                  "reason": reason}]})
        return False
    # The stock interpreter multiplies bf16 as bit patterns; this one rounds as a GPU does.
    from minimind_ds.bench.kernels import interpreter

    interpreter.install()
    interpreter.OPTIONS.races = False
    return True


def run_items(items: Iterable, part: str, file: pathlib.Path, limit_s: float, rates=None) -> int:
    """Runs each item that the file has no record of.  -> 0, or DEVICE_BROKE.

    Args:
        limit_s: seconds that one item may take.
        rates: what gives the machine's own rates, noted once.
    """
    state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"records": [], "seconds": 0.0}
    done = {record["item"] for record in state["records"]}
    if rates and "rates" not in state:
        state["rates"] = rates()
    for item in items:
        if item.name in done:
            continue
        state["running"] = item.name
        write(file, state)
        began = time.perf_counter()
        # Ends the process even where Python waits for a kernel that never ends.
        signal.alarm(int(limit_s))
        record = attempt(item)
        signal.alarm(0)
        took = time.perf_counter() - began
        state["records"].append({"item": item.name, **record, "took_s": round(took, 2)})
        state["seconds"] = round(state["seconds"] + took, 2)
        del state["running"]
        write(file, state)
        print(f"   {record['status']:8} {took:6.1f} s  {part}: {item.name}  {figures(record)}", flush=True)
        if any(word in record.get("reason", "") for word in BROKEN):
            return DEVICE_BROKE
    return 0


def attempt(item) -> dict:
    try:
        return item.work()
    # Any error is recorded, so that the next check runs.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        return {"op": item.name.split()[0], "ours": item.ours, "status": "failed", "reason": reason}


def figures(record: dict) -> str:
    """What a line of progress says of a record."""
    times = [f"{what.replace('_', ' + ')} {record[what]['ms']:.3f} ms ({record[what]['of_floor']:.0%} of floor)"
             for what in ("forward", "forward_backward") if what in record]
    if times:
        return ", ".join(times)
    if "errors" in record:
        return f"largest error {max(pair[0] for pair in record['errors'].values()):.1e} (bound {record['bound']:.0e})"
    if "largest_relative_difference" in record:
        return f"largest difference {record['largest_relative_difference']:.1e} (bound {record['bound']:.0e})"
    return record.get("reason", "")[:120]
