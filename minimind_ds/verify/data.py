"""What is in the data: samples to look at, counts, what would spoil fine-tuning, and the law of the labels.

The law is checked from token ids alone: text never becomes a control token, so `<|im_start|>` and "assistant" begin an
answer and `<|im_end|>` ends it.  The renderer, which labels by who wrote a piece, has no part in the check.

    python launch/verify.py --deepspeed ds_configs/zero2.json --data_path my.jsonl
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

from minimind_ds.data import IGNORE
from minimind_ds.data.conversation import SILENT, Conversation, notes, only_last, read_records
from minimind_ds.data.packing import permutation
from minimind_ds.data.readers import unit_of
from minimind_ds.data.sources import Mixture, what_is_lost
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.training.prepare import PreparedRun

from .checks import Check

# Samples looked at one by one, and records compared with their text.
MOST_SAMPLES, MOST_RECORDS = 20_000, 300
SHOWN_TOKENS = 160
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def some(store: Mixture, most: int, seed: int) -> np.ndarray:
    """Indices of at most so many samples, drawn by the seed, in the file's order."""
    return np.sort(permutation(len(store), seed, 8)[:most])


def learnt(labels: np.ndarray) -> np.ndarray:
    """(T,) bool: token j is predicted by the label of token j - 1."""
    return np.concatenate(([False], labels[:-1] != IGNORE))


@functools.lru_cache
def marks(tok: Tokenizer) -> tuple[int, int, list[int], list[int]]:
    """The start and stop tokens' ids, and those of an answer's header and of a newline."""
    return tok.special_id("<|im_start|>"), tok.special_id("<|im_end|>"), tok.encode("assistant\n"), tok.encode("\n")


def answers(ids: np.ndarray, tok: Tokenizer) -> list[tuple[slice, bool]]:
    """The answers of a conversation, by control tokens alone.

    Returns:
        of each that has a token its tokens, the stop token and the newline after it included, and whether it ends.
    """
    start, stop, header, newline = marks(tok)
    found = []
    stops = np.flatnonzero(ids == stop)
    for at in np.flatnonzero(ids == start).tolist():
        first = at + 1 + len(header)
        if ids[at + 1:first].tolist() != header:
            continue
        later = stops[stops >= first]
        end = min(int(later[0]) + 1 + len(newline), len(ids)) if len(later) else len(ids)
        if first < len(ids):
            found.append((slice(first, end), len(later) > 0))
    return found


def labels_law(prepared: PreparedRun, kind: str) -> list[Check]:
    """labels[i] is the sample's next token; exactly what the assistant wrote is learnt, the stop token with it.

    Where the file or --learn leaves answers out, an answer may be without any label; silent_answers compares those.
    """
    store, tok = prepared.stores[0], prepared.tokenizer
    stop, leaves_out = tok.special_id("<|im_end|>"), store.stats.get(SILENT, 0) > 0 or prepared.run.learn == "last"
    not_next = outside = missing = no_stop = 0
    indices = some(store, MOST_SAMPLES, prepared.run.seed)
    for index in indices:
        ids, labels = store.read([int(index)])
        has_label = labels != IGNORE
        following = np.append(ids[1:], IGNORE)
        not_next += int((labels != following)[has_label].sum())
        told = learnt(labels)
        mine = np.arange(len(ids)) > 0
        if kind == "conversations":
            mine = np.zeros(len(ids), dtype=bool)
            for answer, ended in answers(ids, tok):
                if leaves_out and not told[answer].any():
                    continue
                mine[answer] = True
                no_stop += ended and not (told & (ids == stop) & (labels_before(labels) == stop))[answer].any()
        outside, missing = outside + int((told & ~mine).sum()), missing + int((mine & ~told).sum())
    n = f"of {len(indices):,} samples"
    found = [Check("labels", f"labels {n} that are not the sample's next token", not_next, 0)]
    if kind == "text":
        return [*found, Check("labels", f"tokens {n} without a label", missing, 0)]
    return [*found, Check("labels", f"labels {n} outside the assistant's turns", outside, 0),
            Check("labels", f"the assistant's tokens {n} without a label", missing, 0),
            Check("labels", f"finished answers {n} whose stop token has no label", no_stop, 0),
            *(Check("labels", *found) for found in compared_with_file(prepared))]


def labels_before(labels: np.ndarray) -> np.ndarray:
    """(T,) the label under which token j is learnt."""
    return np.concatenate(([IGNORE], labels[:-1]))


def compared_with_file(prepared: PreparedRun) -> list[tuple[str, int, int]]:
    """Of the first records, answers whose text is not in the text of their labels, and answers that are learnt though
    the file or --learn leaves them out, or the other way round: what, how many, none allowed."""
    lost = seen = wrong = 0
    for _, store in prepared.stores[0].parts():
        index_of = {int(line): index for index, line in enumerate(store.lines)}
        records = read_records(store.sources[0].path, "conversations", "skip")
        for line, item in itertools.islice(records, MOST_RECORDS):
            index = index_of.get(line)
            if index is None or store.lengths[index] >= prepared.run.max_seq_len:
                continue
            assert isinstance(item, Conversation)
            ids, labels = store.read([index])
            item = only_last(item) if prepared.run.learn == "last" else item
            text, told = prepared.tokenizer.decode(labels[labels != IGNORE].tolist()), learnt(labels)
            own = [message for message in item.messages if message.role == "assistant"]
            lost += sum(message.content.rpartition("</think>")[2].strip("\n") not in text for message in own
                        if message.learn)
            flags = [bool(told[answer].any()) for answer, _ in answers(ids, prepared.tokenizer)]
            wrong += sum(a != b.learn for a, b in zip(flags, own)) + abs(len(flags) - len(own))
            seen += len(own)
    return [(f"of {seen:,} answers in the file, those that are not in the labels' text", lost, 0),
            (f"of {seen:,} answers in the file, those learnt or left out against its word", wrong, 0)]


def statistics(prepared: PreparedRun, kind: str) -> dict:
    """Counts over the whole file, and over MOST_SAMPLES of it what takes reading."""
    store, plan = prepared.stores[0], prepared.first_plan
    lengths, stats = store.lengths, store.stats
    indices = some(store, MOST_SAMPLES, prepared.run.seed)
    seen, places, twice, unstopped, cut_answers = set(), set(), 0, 0, 0
    stop = prepared.tokenizer.special_id("<|im_end|>") if kind == "conversations" else prepared.tokenizer.eos_id
    for index in indices:
        ids, labels = store.read([int(index)])
        # What a share above 1 shows again is no duplicate.
        if (place := store.place_of(int(index))) not in places:
            twice += ids.tobytes() in seen
        places.add(place)
        seen.add(ids.tobytes())
        unstopped += stop not in labels
        # Cut while the assistant was speaking: the last token is learnt and does not end an answer.
        full = len(ids) >= prepared.run.max_seq_len and len(ids) > 1
        cut_answers += bool(full and kind == "conversations" and answer_is_open(ids, prepared.tokenizer))
    return {"path": ", ".join(row["path"] for row in store.table()), "samples": len(store),
            "tokens": int(lengths.sum()),
            "labelled_share": float(store.labelled.sum() / max(lengths.sum(), 1)),
            "length": {"min": int(lengths.min()), "median": float(np.median(lengths)), "mean": float(lengths.mean()),
                       "p95": float(np.percentile(lengths, 95)), "max": int(lengths.max())},
            "rows": plan.n_rows, "row_length": prepared.run.row_len, "packing_fill": plan.fill, "steps": len(plan),
            "cut": stats["cut"], "dropped": stats["dropped"], "without_label": stats["unlabelled"],
            "bad_records": stats["skipped"], "notes": notes(stats, prepared.run.text_markers),
            SILENT: stats.get(SILENT, 0), "looked_at": len(indices), "duplicates": twice,
            "stop_never_labelled": unstopped, "cut_inside_answer": cut_answers,
            "sources": store.table()}


def answer_is_open(ids: np.ndarray, tok: Tokenizer) -> bool:
    return not all(ended for _, ended in answers(ids, tok))


def describe(stats: dict) -> list[str]:
    length, sources = stats["length"], stats["sources"]
    return [f"data: {stats['path']}: {stats['samples']:,} samples, {stats['tokens']:,} tokens, "
            f"{stats['labelled_share']:.1%} labelled",
            f"lengths: {length['min']} to {length['max']} tokens, mean {length['mean']:.0f}, median "
            f"{length['median']:.0f}, 95 % below {length['p95']:.0f}",
            f"rows: {stats['rows']:,} of {stats['row_length']} tokens, {stats['packing_fill']:.2%} full; "
            f"{stats['steps']:,} steps an epoch",
            f"cut {stats['cut']:,}, dropped {stats['dropped']:,}, without a label {stats['without_label']:,}, bad "
            f"records {stats['bad_records']:,}",
            *([f"{'source':<24} {'share':>6} {'samples':>9} {'of tokens':>9} {'of labels':>9}"] if len(sources) > 1
              else []),
            *(f"{row['name'][-24:]:<24} {row['share']:>6g} {row['samples']:>9,} {row['share_of_tokens']:>9.1%} "
              f"{row['share_of_labels']:>9.1%}" for row in sources if len(sources) > 1)]


def warnings(prepared: PreparedRun, stats: dict, kind: str) -> list[str]:
    """What spoils fine-tuning, one line each, with what to do."""
    run, tok, n = prepared.run, prepared.tokenizer, stats["looked_at"]
    lines = []
    if stats["bad_records"]:
        bad = next(source.path for source, store in zip(prepared.stores[0].sources, prepared.stores[0].stores)
                   if store.stats["skipped"])
        records = read_records(bad, kind, "skip")
        for _ in records:
            pass
        lines.append(f"{stats['bad_records']:,} bad records, the first: {records.first_skipped}; training stops there "
                     "unless --on_bad_record skip")
    for row in stats["sources"]:
        if row["file"]["lost_tokens"]:
            lines.append(f"{row['path']}: {what_is_lost(row['file'], run.max_seq_len, kind)}")
    if stats["without_label"]:
        lines.append(f"{stats['without_label']:,} records have no label and are left out: their answer begins after "
                     f"--max_seq_len {run.max_seq_len}, is empty, or may not be learnt")
    if stats["cut_inside_answer"]:
        lines.append(f"{stats['cut_inside_answer']:,} of {n:,} samples are cut inside an answer at --max_seq_len "
                     f"{run.max_seq_len}; raise it, or --too_long drop leaves them out")
    if stats["dropped"]:
        lines.append(f"{stats['dropped']:,} samples are longer than --max_seq_len {run.max_seq_len} and dropped")
    if stats["stop_never_labelled"]:
        lines.append(f"{stats['stop_never_labelled']:,} of {n:,} samples never label the stop token: from them the "
                     "model does not learn to end")
    if tok.pad_id == tok.eos_id:
        lines.append(f"the tokenizer's pad token is its end token (id {tok.eos_id}): harmless here, where labels do "
                     "not come from ids; a trainer that masks padding by its id would never learn to end")
    if stats["duplicates"]:
        lines.append(f"{stats['duplicates']:,} of {n:,} samples stand there more than once, token for token")
    if prepared.model_config.use_moe and run.moe_balance == "batch":
        lines.append("--moe_balance batch depends on how rows are dealt to micro-batches, as MiniMind's does; the "
                     "laws are checked with row")
    return lines


def show(prepared: PreparedRun, count: int, *, color: bool) -> list[str]:
    """Samples as text, what is learnt in green or in [brackets]."""
    store, tok, lines = prepared.stores[0], prepared.tokenizer, []
    before, after = (GREEN, PLAIN) if color else ("[", "]")
    for index in some(store, count, prepared.run.seed):
        ids, labels = store.read([int(index)])
        path = store.sources[int(store.source_of([index])[0])].path
        of = f" of {path}" if len(store.sources) > 1 else ""
        lines.append(f"--- {unit_of(path)} {store.lines[index]}{of}: {len(ids)} tokens, "
                     f"{(labels != IGNORE).sum()} labelled")
        told, text = learnt(labels), ""
        bounds = [0, *(np.flatnonzero(np.diff(told.astype(np.int8))) + 1).tolist(), len(ids)]
        for first, end in zip(bounds, bounds[1:]):
            part = shorten(printable(tok.decode(ids[first:end].tolist())))
            text += f"{before}{part}{after}" if told[first] else part
        lines.append(text)
    return lines


def shorten(text: str) -> str:
    """The two ends of a long stretch: where labels begin and end is what is to be seen."""
    half = 2 * SHOWN_TOKENS
    return text if len(text) <= 2 * half else f"{text[:half]} …({len(text) - 2 * half} more)… {text[-half:]}"


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters are written out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
