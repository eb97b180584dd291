"""Imported before anything else of the package that needs a library: where one is missing, one line says so.

    python3 launch/chat.py     # without the virtual environment
"""

import importlib.util
import sys

for name in ("yaml", "psutil", "numpy", "torch", "deepspeed"):
    if importlib.util.find_spec(name) is None:
        print(f"error: {sys.executable} has no {name}: `source .venv/bin/activate` in the checkout, where "
              "launch/quickstart.sh has installed it, or `pip install . -c constraints.txt`", file=sys.stderr)
        raise SystemExit(2)
