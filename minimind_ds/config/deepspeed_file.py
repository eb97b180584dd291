"""The DeepSpeed file as it stands: read within bounds, as DeepSpeed's own reader takes it.

Here without torch, so that a file that is not there, or is no JSON, is told at once.

    python -c "from minimind_ds.config.deepspeed_file import read_json; print(read_json('ds_configs/zero2.json'))"
"""

from __future__ import annotations

import collections
import copy
import json
import pathlib

import hjson

from minimind_ds.config.deepspeed_keys import show
from minimind_ds.config.errors import UserError
from minimind_ds.config.run import RunConfig
from minimind_ds.paths import DS_CONFIGS

# Files of peers are below 10 kB and 8 levels.
MOST_BYTES, MOST_LEVELS, MOST_VALUES = 2**18, 32, 2**17


def read(run: RunConfig) -> dict:
    """A run's DeepSpeed configuration: its file, or the block in its YAML.  Raises UserError where it names none."""
    if run.deepspeed is None:
        raise UserError("--deepspeed is missing: name a DeepSpeed JSON file, for example ds_configs/zero1.json")
    if run.deepspeed_block is not None and run.deepspeed == run.given.get("deepspeed"):
        check_form(run.deepspeed, run.deepspeed_block)
        return copy.deepcopy(run.deepspeed_block)
    return read_json(run.deepspeed)


def read_json(path: str) -> dict:
    """A DeepSpeed JSON file -> dict; comments and trailing commas are allowed, as in DeepSpeed.

    Raises:
        UserError: not there, too large, not JSON (with the line), not an object, or a key written twice.
    """
    def no_doubles(pairs):
        twice = [key for key, times in collections.Counter(key for key, _ in pairs).items() if times > 1]
        if twice:
            raise UserError(f"{path}: key {show(twice[0])} appears twice")
        return dict(pairs)

    try:
        if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
            raise UserError(f"the DeepSpeed file {path} is no regular file")
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        names = ", ".join(sorted(f.stem for f in DS_CONFIGS.glob("*.json")))
        shipped = f"; shipped ones are {names}" if missing else ""
        raise UserError(f"cannot read the DeepSpeed file {path}: {error.strerror}{shipped}") from None
    except UnicodeDecodeError:
        raise UserError(f"the DeepSpeed file {path} is not UTF-8") from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{path} is larger than {MOST_BYTES >> 10} KiB; a DeepSpeed file is not")
    if not text.strip():
        raise UserError(f"the DeepSpeed file {path} is empty")
    try:
        config = parse(text, no_doubles)
    except UserError:
        raise
    except (json.JSONDecodeError, hjson.HjsonDecodeError) as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except (ValueError, OverflowError) as error:
        # A number of more digits than Python reads.
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed file holds one JSON object")
    check_form(path, config)
    return config


def parse(text: str, hook):
    """JSON, or what DeepSpeed's own reader takes for it: with comments, trailing commas, bare words."""
    try:
        return json.loads(text, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        try:
            return hjson.loads(text, object_pairs_hook=hook)
        except LookupError:
            # hjson reads beyond the text's end.
            raise error from None
        except hjson.HjsonDecodeError:
            if any(mark in text for mark in ("//", "/*", "#")):
                raise
            # Without comments the strict reader's word is the plainer one.
            raise error from None


def check_form(path: str, config: dict) -> None:
    """Raises UserError for what no configuration holds: many levels or values, odd keys, what is no JSON (in YAML)."""
    level = [("", config)]
    for _ in range(MOST_LEVELS):
        below = []
        for at, item in level:
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str) or not key.isprintable():
                        raise UserError(f"{path}: key {show(key)} is no text on one line")
                below += [(f"{at}.{key}" if at else key, part) for key, part in item.items()]
            elif isinstance(item, list):
                below += [(f"{at}[{i}]", part) for i, part in enumerate(item)]
            elif not isinstance(item, (str, int, float, type(None))) or isinstance(item, str) and not is_text(item):
                kind = "no text that a file can hold" if isinstance(item, str) else "no value of JSON"
                raise UserError(f"{path}: {at[:80]} is {show(item)}, which is {kind}")
            if len(below) > MOST_VALUES:
                raise UserError(f"{path}: more than {MOST_VALUES} values; a DeepSpeed file has a hundred")
        level = below
        if not level:
            return
    raise UserError(f"{path}: nested too deeply")


def is_text(value: str) -> bool:
    """Whether a text can be written to a file and name one: no half of a surrogate pair, no NUL."""
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
