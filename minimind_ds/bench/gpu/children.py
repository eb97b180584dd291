"""What each group's process of the GPU check runs: items by part and name, their results kept one by one.

    python -m minimind_ds.bench.gpu OUT_DIR --parts agreement
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import time

from minimind_ds.bench.supervise import write

# What has to be there.
MODULES = ("torch", "triton", "numpy", "deepspeed", "transformers", "tokenizers", "sentencepiece", "safetensors",
           "yaml", "tqdm", "hjson", "pydantic", "psutil", "packaging")
# Packages of other names.
PACKAGES = {"yaml": "pyyaml"}
LIMIT, LIMIT_SMALL = 100, 600


def run(name: str, file: pathlib.Path, *, small: bool, folder: pathlib.Path) -> int:
    """The process of group `part.name`.  -> exit status."""
    part, name = name.split(".")
    if part == "imports":
        return check_imports(file)
    import torch

    from minimind_ds.bench.kernels.items import Setting, rate_of
    from minimind_ds.bench.kernels.runner import interpreted, run_items

    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    elif part in ("agreement", "variants") and not interpreted(part, name, file):
        return 0
    setting = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"), small)
    rates = functools.partial(rate_of, torch.bfloat16, setting) if part in ("products", "variants") else None
    module = "variants" if name.endswith("_variants") else "products" if part == "products" else "training"
    items = importlib.import_module(f"minimind_ds.bench.gpu.{module}").items
    return run_items(items(part, name, setting, folder), part, file, LIMIT_SMALL if small else LIMIT, rates)


def check_imports(file: pathlib.Path) -> int:
    """One record: every package, or which are missing and what to do; and the machine."""
    began, missing, seconds = time.perf_counter(), [], {}
    for module in MODULES:
        start = time.perf_counter()
        try:
            importlib.import_module(module)
        # A package that is there and breaks while loading is no better.
        except Exception as error:  # noqa: BLE001
            missing.append(f"{PACKAGES.get(module, module)} ({type(error).__name__}: {str(error)[:120]})")
        seconds[module] = round(time.perf_counter() - start, 2)
    record = {"item": "imports", "op": "imports", "ours": True, "status": "failed" if missing else "right",
              "seconds": seconds}
    if missing:
        record["reason"] = (f"cannot import {', '.join(missing)}: on a machine with a network run bash "
                            "launch/gpu_check.sh --make_wheels DIR, bring DIR here and add --wheels DIR")
    else:
        import torch

        from minimind_ds.bench.machine import machine

        record |= {"cuda": torch.cuda.is_available(), "machine": machine()}
        if record["cuda"]:
            # The context, and whether anything runs at all.
            torch.ones(8, device="cuda").sum().item()
    write(file, {"records": [record], "seconds": round(time.perf_counter() - began, 2)})
    print(f"   {record['status']}: {record.get('reason', record.get('machine', {}).get('device'))}", flush=True)
    return 0
