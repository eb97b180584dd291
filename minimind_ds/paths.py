"""Where the project's own files lie, and where it keeps what it makes anew when it is gone."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DS_CONFIGS = ROOT / "ds_configs"
ASSETS = ROOT / "minimind_ds" / "assets"


def cache_folder() -> pathlib.Path:
    """The user's cache folder for this program, by the XDG rules."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "minimind_ds"
