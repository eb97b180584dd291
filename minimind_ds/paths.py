"""Where the project's own files lie, in a checkout and in a wheel, and where it keeps what it makes anew."""

import os
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parent
# setup.py puts the folders of the checkout's root into the wheel's package.
ROOT = PACKAGE if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent
EXAMPLES = ROOT / "examples"
DS_CONFIGS = ROOT / "ds_configs"
LAUNCH = ROOT / "launch"
ASSETS = PACKAGE / "assets"


def at_home(path: str) -> str:
    """The path with the home folder for ~ or ~name; as it is where there is no such home."""
    try:
        return os.path.expanduser(path)
    # Not a name that a user can have.
    except ValueError:
        return path


def is_bare(name: str) -> bool:
    """Whether this is a name as MiniMind gives weights, such as full_sft, and not a path: nothing of it is there."""
    path = pathlib.Path(name)
    return path.name == name and path.suffix not in (".pth", ".safetensors") and not path.exists()


def cache_folder() -> pathlib.Path:
    """The user's cache folder for this program, by the XDG rules."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "minimind_ds"
