"""The GPU check's results as a page: throughput, stages, what a step's time goes to, what to do next.

    python -m minimind_ds.bench.gpu OUT_DIR
"""

from __future__ import annotations

from minimind_ds.bench.supervise import BAD

LAYERS = 8
# How often a step of the dense model runs an operation (the experts and their router: of the mixture).
PER_STEP = {"attention": LAYERS, "moe": LAYERS, "qk_norm_rope": LAYERS, "add_rms_norm": 2 * LAYERS + 1,
            "swiglu": LAYERS, "head_loss": 1, "router": LAYERS}


def text(document: dict) -> str:
    machine = document["machine"]
    results = {name: part["results"] for name, part in document["parts"].items()}
    lines = [f"# GPU check: {machine.get('device', 'no device')}, {machine.get('date', '')}", "",
             f"{document['mode']}; torch {machine.get('torch')}, triton {machine.get('triton')}, DeepSpeed "
             f"{machine.get('deepspeed')}, driver {machine.get('driver')}, commit {machine.get('commit')}", "",
             f"{'all right' if document['ok'] else 'NOT ALL RIGHT'} after {document['seconds']:.0f} s "
             f"({'; '.join(document['notes'])})", ""]
    lines += wrong([r for records in results.values() for r in records]) + left_out(results)
    lines += throughput(results.get("throughput", [])) + stages(results.get("stages", []))
    lines += profile(results.get("throughput", [])) + timed(results)
    lines += ["", "## What to do next, by milliseconds of a dense step of 32,768 tokens over the floor", ""]
    lines += [f"- {ms:.2f} ms: {what}" for ms, what in gaps(results)[:12]]
    return "\n".join(lines) + "\n"


def wrong(records: list[dict]) -> list[str]:
    bad = [r for r in records if r["status"] in BAD]
    return [f"- **{r['status']}**{'' if r['ours'] else ' (not ours)'} {r.get('item') or r['op']}: "
            f"{str(next((r[key] for key in ('reason', 'errors', 'moved') if r.get(key)), ''))[:300]}" for r in bad]


def left_out(results: dict) -> list[str]:
    """The parts that the interpreter cannot run here, and why."""
    found = {name: r["reason"] for name, records in results.items() for r in records if r["op"] == "interpreter"}
    return [f"- left out: {', '.join(found)}: {next(iter(found.values()))}"] if found else []


def throughput(records: list[dict]) -> list[str]:
    found = [r for r in records if r["op"] == "throughput" and "tokens_per_s" in r]
    if not found:
        return []
    rows = ["", "## Training, real tokens/s on one device", "",
            "| what | tokens/s | least to most | step, ms | MFU (measured peak) | forward / backward / update, ms |",
            "|---|---:|---|---:|---:|---|"]
    for r in found:
        split = r.get("split_s") or {}
        shares = " / ".join(f"{1e3 * split[part]:.1f}" for part in ("forward", "backward", "optimizer")) \
            if split else ""
        mfu = f"{r['mfu']:.1%}" if "mfu" in r else ""
        rows.append(f"| {r['case']} | {r['tokens_per_s']:,.0f} | {r['tokens_per_s_min']:,.0f} to "
                    f"{r['tokens_per_s_max']:,.0f} | {1e3 * r['step_s']:.1f} | {mfu} | {shares} |")
    return rows


def stages(records: list[dict]) -> list[str]:
    found = [r for r in records if "ratio" in r]
    return ["", "## ZeRO stages against PyTorch alone", "", "| | ratio | quartiles |", "|---|---:|---|",
            *(f"| {r['case']} | {r['ratio']:.3f} | {r['ratio_q1']:.3f} to {r['ratio_q3']:.3f} |" for r in found)] \
        if found else []


def profile(records: list[dict]) -> list[str]:
    lines = []
    for r in records:
        if r["op"] != "profile" or "top" not in r:
            continue
        lines += ["", f"## A step under the profiler: {r['case']}", "",
                  f"{r['step_ms']:.1f} ms, {r['operations_per_step']:.0f} launches, nothing running "
                  f"{r['host_bound_share']:.1%} of the time", "", "| ms | calls | |", "|---:|---:|---|"]
        lines += [f"| {t['ms']:.3f} | {t['calls']:.0f} | `{t['name'][:100]}` |" for t in r["top"][:40]]
    return lines


def timed(results: dict) -> list[str]:
    lines = []
    for part in ("products", "variants", "timings"):
        found = [r for r in results.get(part, []) if "forward" in r]
        if not found:
            continue
        lines += ["", f"## {part}", "", "| | forward, ms | of floor | both, ms | of floor | on the host, ms |",
                  "|---|---:|---:|---:|---:|---:|"]
        for r in found:
            both = r.get("forward_backward")
            lines.append(
                f"| {r.get('item') or r['op']} | {r['forward']['ms']:.3f} | {r['forward']['of_floor']:.0%} | "
                + (f"{both['ms']:.3f} | {both['of_floor']:.0%} | {both.get('host_ms', 0):.3f} |" if both
                   else f"| | {r['forward'].get('host_ms', 0):.3f} |"))
    return lines


def gaps(results: dict) -> list[tuple[float, str]]:
    """(milliseconds of a step that a floor does not explain, what), largest first."""
    found = []
    for r in results.get("variants", []):
        if r.get("as_shipped") and "forward_backward" in r and "long" not in r.get("item", ""):
            both, times = r["forward_backward"], PER_STEP[r["op"]]
            found.append((times * (both["ms"] - both["floor_ms"]), f"{r['op']}, {times} times {both['ms']:.3f} ms, "
                                                                   f"{both['of_floor']:.0%} of its floor"))
    shipped = {r["op"]: r for r in results.get("variants", []) if r.get("as_shipped") and "long" not in r["item"]}
    for r in results.get("variants", []):
        base = shipped.get(r["op"])
        if base and not r.get("as_shipped") and "forward_backward" in r and "long" not in r["item"]:
            gain = PER_STEP[r["op"]] * (base["forward_backward"]["ms"] - r["forward_backward"]["ms"])
            found.append((gain, f"take {r['op']}: {r['variant']}"))
    for r in results.get("throughput", []):
        if r["op"] == "profile" and "host_bound_share" in r:
            found.append((r["host_bound_share"] * r["step_ms"], f"no kernel runs: {r['case']}"))
    return sorted(found, reverse=True)
