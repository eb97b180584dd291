"""Where the project's own files lie."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DS_CONFIGS = ROOT / "ds_configs"
ASSETS = ROOT / "minimind_ds" / "assets"
