"""The weights that a run leaves in its folder: the last, and with --keep_best those of the lowest evaluation loss.

last.json and best.json name the file, the step and its evaluation.

    python launch/chat.py --weight out/best
"""

from __future__ import annotations

import json
import pathlib

from minimind_ds.config.errors import UserError
from minimind_ds.convert import weight_files
from minimind_ds.convert.vocabulary import Vocabulary
from minimind_ds.distributed import engine
from minimind_ds.io import fsync, write_file
from minimind_ds.model import lora
from minimind_ds.training.live import LiveRun
from minimind_ds.training.prepare import PreparedRun

LAST, BEST = "last", "best"


def path_of(prepared: PreparedRun, name: str) -> pathlib.Path:
    """The best weights have a folder of their own, so that the run folder still means the last ones."""
    path = prepared.weights_path
    return path if name == LAST else path.parent / BEST / path.name


def put(prepared: PreparedRun, live: LiveRun, name: str, facts: dict) -> pathlib.Path:
    """Writes the weights as they are now, and `name`.json with their file and `facts`; collective.  -> the file."""
    live.beat("the final weights" if name == LAST else "the best weights")
    whole, path = engine.full_weights(live.engine, prepared.stage), path_of(prepared, name)
    if prepared.world.rank == 0:
        note = prepared.folder / f"{name}.json"
        # It never names other weights than those that lie there.
        note.unlink(missing_ok=True)
        if not path.parent.exists():
            path.parent.mkdir()
            fsync(prepared.folder)
        if name == BEST:
            prepared.tokenizer.save(path.parent / "tokenizer")
        trained_with = Vocabulary.of(prepared.tokenizer).to_json()
        if prepared.lora:
            lora.save_adapters(path, whole, prepared.lora, prepared.model_config, trained_with)
        else:
            weight_files.save_safetensors(path, whole, prepared.model_config, trained_with)
        facts = {"file": path.relative_to(prepared.folder).as_posix(), **facts}
        write_file(note, json.dumps(facts, indent=1) + "\n")
    return path


def forget(prepared: PreparedRun) -> None:
    """A run starts over: what the one before it called its best and last is so no more."""
    for name in (LAST, BEST):
        (prepared.folder / f"{name}.json").unlink(missing_ok=True)
    path = path_of(prepared, BEST)
    if path.parent.is_dir() and not path.parent.is_symlink():
        path.unlink(missing_ok=True)


def check(run) -> None:
    """Raises UserError where --keep_best has no folder to write to."""
    folder = pathlib.Path(run.save_dir) / BEST
    if run.keep_best and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
        raise UserError(f"{folder} is no folder of this run's, and the best weights go there "
                        f"({run.place('keep_best')}): move it")
