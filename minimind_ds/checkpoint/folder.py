"""Atomic checkpoints: complete or absent.

A checkpoint is written aside, every file is fsynced and hashed into a manifest, the folder is renamed into place, and
only then does `latest` point to it.  Loading checks every size and hash first; a torn or altered checkpoint is named
and the newest good one is used.  DeepSpeed's own files are opened only after that check, with
weights_only=True.

    <run>/checkpoints/step_00000040/{manifest.*, state/*.pt, rng_rank0.safetensors}    <run>/checkpoints/latest
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minimind_ds.checkpoint import full_state
from minimind_ds.checkpoint.async_save import AsyncSave, SaveFailed, facts_of, sha256, snapshot
from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.untrusted import shown
from minimind_ds.distributed import deepspeed_compat
from minimind_ds.io import fsync, write_file

FORMAT = 2
TAG = "state"
# The run's tokenizer, in its folder and in each checkpoint.
TOKENIZER = "tokenizer"
# What this program calls its checkpoints; nothing else in their folder is read or deleted.
STEP = re.compile(r"step_\d{8,}")
# What manifest.sha256 holds; a manifest has some 150 bytes a file, and three files a rank.
SEAL, MOST_OF_MANIFEST = "0" * 64 + "\n", 16 << 20
# What manifests say of a run, each with what it must be.
FACTS = {**dict.fromkeys(("step", "epoch", "epoch_step"), lambda value: type(value) is int and 0 <= value < 1 << 53),
         **dict.fromkeys(("identity", "layout"), lambda value: isinstance(value, dict))}


class NoCheckpoint(UserError):
    """A checkpoint that was asked for by name is not there or not whole."""


def folder_of(run_dir: pathlib.Path) -> pathlib.Path:
    return run_dir / "checkpoints"


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def listed(home: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in their folder, newest first; links and other names are not ours."""
    return sorted((path for path in home.glob("step_*")
                   if STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()), reverse=True)


def lock(run_dir: pathlib.Path):
    """Hold a run folder for this process; the operating system lets go when it ends, however it ends.

    Returns:
        The open file; keep it.

    Raises:
        ValueError: another process holds it.
    """
    path = run_dir / ".lock"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is not the file that runs lock: delete it, or name another --save_dir")
    file = path.open("a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{run_dir} is in use by {file.read(200).strip() or 'another run'}; stop that run, or name "
                         "another --save_dir") from None
    except OSError:
        # A file system without locks: nothing can be held there.
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def together(error: Exception | None, doing: str, kind: type = RuntimeError) -> None:
    """Raise a `kind` of error on all ranks when one failed, so that none waits for it."""
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    for rank, message in enumerate(errors):
        if message is not None:
            raise kind(f"{doing} failed on rank {rank}: {message}")


def save(engine, run_dir: pathlib.Path, *, facts: dict, keep: int, passed_over: Collection[str] = ()) -> AsyncSave:
    """Begin a checkpoint; collective.  It is there when the result's `finish` has returned.

    Its state is DeepSpeed's own files; or the whole state (full_state.py), where experts are shared out.

    Args:
        engine: the DeepSpeed engine; it may train on as soon as this returns.
        facts: goes into the manifest: at least 'step', 'epoch', 'epoch_step', 'layout' and 'identity'.
        keep: how many of the newest checkpoints stay: the one just written and those before it.
        passed_over: names of some that count for nothing and go.

    Raises:
        SaveFailed: on every rank, naming the one that failed.  Earlier checkpoints are untouched.
    """
    rank, home = dist.get_rank(), folder_of(run_dir)
    aside, final = home / f".writing_{name_of(facts['step'])}", home / name_of(facts["step"])
    error, files = None, []
    if rank == 0:
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            if (run_dir / TOKENIZER).is_dir():
                # A checkpoint that is moved elsewhere can still speak.
                shutil.copytree(run_dir / TOKENIZER, aside / TOKENIZER)
        except OSError as caught:
            error = caught
    together(error, f"writing {final}", SaveFailed)
    try:
        files = [(aside / f"rng_rank{rank}.safetensors", functools.partial(save_file, rng_state())),
                 *state_files(engine, aside)]
    except (OSError, RuntimeError) as caught:
        error = caught
    together(error, f"writing {final}", SaveFailed)

    def commit_and_retain(written: dict) -> None:
        commit(aside, final, facts, written)
        retain(final, keep, passed_over)

    return AsyncSave(files, root=aside, commit=commit_and_retain, what=f"writing {final}")


def state_files(engine, aside: pathlib.Path) -> list[tuple[pathlib.Path, Callable]]:
    """The files of the training state that this rank has to write, and what writes each; collective."""
    if engine.has_moe_layers:
        state = full_state.collect(engine)
        write = functools.partial(full_state.write_file, state)
        return [] if state is None else [(aside / TAG / full_state.FILE, write)]
    with deepspeed_compat.recorded_files(engine, copy=snapshot) as files:
        # DeepSpeed refuses to convert a checkpoint to its universal format without this.
        engine.save_checkpoint(str(aside), tag=TAG, save_latest=False,
                               client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}})
    return [(path, write if state is None else functools.partial(write_state, state)) for path, state, write in files]


def write_state(state, path: pathlib.Path) -> None:
    """torch.save.  Raises OSError for what the disk says."""
    # Given a path, torch writes the file itself and knows no errors of disks.
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # Its zip writer, told to end the file after the disk's error, complains of "unexpected pos 704 vs 598".
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def commit(aside: pathlib.Path, final: pathlib.Path, facts: dict, written: dict) -> None:
    """Manifest, fsync, rename, pointer: in this order.  `written`: the files that ranks wrote, fsynced and hashed."""
    files = dict(written)
    for path in (p for p in aside.rglob("*") if p.is_file()):
        name = path.relative_to(aside).as_posix()
        if name not in files:
            # DeepSpeed adds another program.
            fsync(path)
            files[name] = facts_of(path)
    for path in (aside, *(p for p in aside.rglob("*") if p.is_dir())):
        fsync(path)
    keep_metrics(final.parent.parent)
    in_order = dict(sorted(files.items()))
    write_file(aside / "manifest.json", json.dumps({"format": FORMAT, **facts, "files": in_order}, indent=1))
    write_file(aside / "manifest.sha256", sha256(aside / "manifest.json") + "\n")
    if final.exists():
        discard(final)
    os.rename(aside, final)
    fsync(final.parent)
    write_file(final.parent / "latest", final.name + "\n")


def keep_metrics(run_dir: pathlib.Path) -> None:
    """What metrics.jsonl says so far is on disk from now on: a resumed run goes on with its lines."""
    if (path := run_dir / "metrics.jsonl").exists():
        fsync(path)
        # It is new there, or has replaced the one of the start before.
        fsync(run_dir)


def discard(path: pathlib.Path) -> None:
    """Delete a checkpoint so that a half-deleted one is never taken for one."""
    doomed = path.with_name(f".deleting_{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def retain(newest: pathlib.Path, keep: int, passed_over: Collection[str] = ()) -> None:
    """Delete all but `newest`, which was just written, and the keep - 1 before it.

    Those of later steps go too, and those whose names are in `passed_over`: this run passed them over, as damaged or
    because it was told to start from an earlier one, and takes their steps again.  Counted among the newest they would
    push out whole ones.
    """
    home, kept = newest.parent, 0
    for path in listed(home):
        counts = path.name < newest.name and path.name not in passed_over
        if path == newest or counts and kept < keep:
            kept += 1
        else:
            discard(path)
    remove_halves(home)


def remove_halves(home: pathlib.Path) -> None:
    """Delete what was being written or deleted when a process ended."""
    for left in (*home.glob(".writing_step_*"), *home.glob(".deleting_step_*")):
        if not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def clear(run_dir: pathlib.Path) -> None:
    """Delete a run folder's checkpoints, and nothing else that may lie beside them.

    Raises:
        ValueError: their folder is a link.
    """
    home = folder_of(run_dir)
    if home.is_symlink():
        raise UserError(f"{home} is a link, and --from_resume none deletes nothing through one: delete the "
                        "checkpoints there yourself, or name another --save_dir")
    for path in listed(home):
        discard(path)
    remove_halves(home)
    (home / "latest").unlink(missing_ok=True)


def verify(path: pathlib.Path) -> tuple[dict | None, str | None]:
    """-> (manifest, None) for a whole checkpoint, (None, what is wrong) for any other."""
    try:
        seal = untrusted.read_bytes(path / "manifest.sha256", len(SEAL))
        content = untrusted.read_bytes(path / "manifest.json", MOST_OF_MANIFEST)
        if seal != f"{hashlib.sha256(content).hexdigest()}\n".encode():
            return None, f"{path / 'manifest.json'} was altered: its SHA-256 is not that of manifest.sha256"
        manifest = untrusted.json_object(content.decode(), str(path / "manifest.json"))
        if manifest["format"] != FORMAT:
            return None, f"{path} has format {shown(manifest['format'])}; this program reads format {FORMAT}"
        for name, right in FACTS.items():
            if name in manifest and not right(manifest[name]):
                return None, f"{path}: its manifest says that {name} is {shown(manifest[name])}"
        files = manifest["files"].items()
        if stranger := unlisted(path, manifest["files"]):
            return None, stranger
        for name, facts in files:
            file = path / name
            if not file.is_file():
                return None, f"{file} is missing"
            if file.stat().st_size != facts["bytes"]:
                return None, f"{file} has {file.stat().st_size} bytes instead of {facts['bytes']}"
        for name, facts in files:
            if sha256(path / name) != facts["sha256"]:
                return None, f"{path / name} was altered: its SHA-256 is not the manifest's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not all((path / name).exists() for name in ("manifest.json", "manifest.sha256")):
            return None, f"{path} has no manifest.json or manifest.sha256"
        return None, f"{path}: the manifest is damaged ({first_line(error)})"
    return manifest, None


def unlisted(path: pathlib.Path, files: dict) -> str | None:
    """What a checkpoint's folder holds that its manifest does not account for: DeepSpeed would open it, too."""
    outside = [name for name in files if pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/")]
    if outside:
        return f"{path}: its manifest lists {outside[0][:100]!r}, which is outside of it"
    folders = {str(parent) for name in files for parent in pathlib.PurePosixPath(name).parents}
    for found in sorted(path.rglob("*")):
        name = found.relative_to(path).as_posix()
        if found.is_symlink() or not (found.is_file() or found.is_dir()):
            return f"{found} is a link or a special file; a checkpoint has none"
        if name not in (folders if found.is_dir() else files) and name not in ("manifest.json", "manifest.sha256"):
            return f"{found} is not in the checkpoint's manifest: delete it if you know what it is"
    return None


def find(asked: str, run_dir: pathlib.Path) -> tuple[pathlib.Path | None, dict | None, list[str]]:
    """The checkpoint to resume from.

    Args:
        asked: 'none', 'auto' (the newest whole one under run_dir) or a path to a checkpoint or a run folder.

    Returns:
        (path, manifest, complaints): path None means start fresh; complaints name what was passed over.

    Raises:
        NoCheckpoint: a path that was asked for holds no whole checkpoint; or 'auto' found only damaged ones.
    """
    if asked == "none":
        return None, None, []
    root = run_dir if asked == "auto" else pathlib.Path(asked)
    if (root / "manifest.json").exists():
        manifest, wrong = verify(root)
        if wrong:
            raise NoCheckpoint(f"--from_resume: {wrong}")
        return root, manifest, []
    complaints = []
    for path in listed(folder_of(root)):
        manifest, wrong = verify(path)
        if manifest:
            pointed = folder_of(root) / "latest"
            if read_pointer(pointed) != path.name:
                complaints.append(f"{pointed} does not name the newest whole checkpoint; using {path.name}")
            return path, manifest, complaints
        complaints.append(f"passed over a damaged checkpoint: {wrong}")
    if asked != "auto":
        raise NoCheckpoint(f"--from_resume: no checkpoint in {asked}" + "".join(f"; {c}" for c in complaints))
    if complaints:
        raise NoCheckpoint(f"no whole checkpoint left in {run_dir} ({'; '.join(complaints)}); "
                           "--from_resume none starts over")
    return None, None, []


def read_pointer(path: pathlib.Path) -> str | None:
    try:
        return untrusted.read_bytes(path).decode("utf-8", "replace").strip()
    except UserError:
        return None


def peek(asked: str, run_dir: pathlib.Path) -> dict:
    """The identity of the run that `asked` ('auto' or a path) would go on with, read without a check; {} if none."""
    root = run_dir if asked == "auto" else pathlib.Path(asked)
    of_steps = [path / "manifest.json" for path in listed(folder_of(root))]
    for path in (root / "DONE", root / "manifest.json", *of_steps):
        try:
            text = untrusted.read_text(path, MOST_OF_MANIFEST)
            return dict(untrusted.json_object(text, str(path))["identity"])
        except (ValueError, KeyError, TypeError):
            continue
    return {}


def load(engine, path: pathlib.Path) -> None:
    """Load a verified checkpoint of the same layout into the engine; collective."""
    try:
        with deepspeed_compat.safe_loading(engine):
            loaded, _ = engine.load_checkpoint(str(path), tag=TAG)
        if loaded is None:
            raise KeyError(f"DeepSpeed found nothing under {path}")
        deepspeed_compat.continue_betas(engine)
        load_rng(path)
    except (KeyError, TypeError, AttributeError, IndexError, AssertionError, FileNotFoundError,
            SafetensorError) as error:
        raise UserError(f"{path}: its files are whole, and not what this run's engine writes ({type(error).__name__}: "
                        f"{first_line(error)}); --from_resume none starts over") from None


def load_rng(path: pathlib.Path) -> None:
    set_rng_state(load_file(path / f"rng_rank{dist.get_rank()}.safetensors"))


def rng_state() -> dict[str, torch.Tensor]:
    """torch's generators, which dropout draws from; the order of the data needs none."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
