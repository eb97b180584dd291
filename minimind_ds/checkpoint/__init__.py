"""Checkpoints that are whole or do not exist: write, verify, find, retain; load on this layout or another."""

from .folder import (
    FACTS,
    TAG,
    NoCheckpoint,
    clear,
    commit,
    discard,
    find,
    folder_of,
    keep_metrics,
    listed,
    load,
    load_rng,
    lock,
    name_of,
    peek,
    retain,
    rng_state,
    save,
    set_rng_state,
    together,
    verify,
    write_state,
)

__all__ = ["FACTS", "TAG", "NoCheckpoint", "clear", "commit", "discard", "find", "folder_of", "keep_metrics", "listed",
           "load", "load_rng", "lock", "name_of", "peek", "retain", "rng_state", "save", "set_rng_state", "together",
           "verify", "write_state"]
