"""How a token cache is built: going on where it was interrupted, in bounded memory, and never trusted unread.

    python -m pytest tests/data/test_build.py
"""

import fcntl
import gzip
import json
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from minimind_ds.config.errors import UserError
from minimind_ds.data import build as build_module
from minimind_ds.data import store as store_module
from minimind_ds.data import tokenise
from minimind_ds.data.conversation import IGNORED, DataError
from minimind_ds.data.journal import JOURNAL, Part, position_of
from minimind_ds.data.readers import RecordFile
from minimind_ds.data.sample import Augment, build_sample
from minimind_ds.data.store import open_or_build
from minimind_ds.data.tokenise import Encoder, Progress, usable_cores, worker_count
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.data.turns import MOST_NAMES
from tests.conftest import ROOT, environment
from tests.data.test_store import flip_bit, talk, write_lines


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(None)


@pytest.fixture
def build(tok, tmp_path):
    def build(path, **changes):
        return open_or_build(path, tok, **{"kind": "conversations", "max_seq_len": 64, "cache_dir": tmp_path / "cache",
                                           **changes})
    return build


@pytest.fixture
def small(monkeypatch):
    """Chunks and blocks of a few samples."""
    monkeypatch.setattr(tokenise, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(build_module, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 4096)


# Going on


@pytest.fixture
def interrupted(monkeypatch, small, build, tmp_path):
    """interrupted(): the part folder of a build that was interrupted after five chunks; and the calls since."""
    calls, firsts, encode = [], [], Encoder.__call__

    def counted(self, raws, first_index):
        calls.append(first_index)
        if len(calls) == 6 and not firsts:
            raise KeyboardInterrupt
        return encode(self, raws, first_index)
    path = write_lines(tmp_path / "talks.jsonl", map(talk, range(400)))
    whole = build(path, cache_dir=tmp_path / "other").content
    monkeypatch.setattr(Encoder, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        build(path)
    firsts += calls
    calls.clear()
    return path, next((tmp_path / "cache").glob(".*.part")), firsts, calls, whole


def test_an_interrupted_build_goes_on_after_its_last_whole_chunk_to_the_same_bytes(interrupted, build, capsys):
    path, part, firsts, calls, whole = interrupted
    assert len(Part(part).stats) and len((part / JOURNAL).read_text().splitlines()) == 5
    store = build(path)
    assert calls[0] == firsts[5] and f"going on after {firsts[5]:,} records" in capsys.readouterr().err
    assert store.content == whole and len(store) == 400 and store.stats["records"] == 400
    assert not part.exists() and not (store.folder / JOURNAL).exists()
    store.verify()


@pytest.mark.parametrize("damage, whole_chunks", [
    (lambda part: os.truncate(part / "tokens.bin", (part / "tokens.bin").stat().st_size - 1), 4),
    (lambda part: flip_bit(part / "tokens.bin", 5), 0),
    (lambda part: flip_bit(part / "lines.bin", -1), 4),
    (lambda part: os.truncate(part / JOURNAL, (part / JOURNAL).stat().st_size - 9), 4),
    (lambda part: (part / JOURNAL).unlink(), 0),
    (lambda part: (part / "tokens.bin").open("ab").write(b"more than the journal knows of"), 5),
], ids=["tokens_cut", "token", "line", "journal_torn", "journal_gone", "chunk_without_its_line"])
def test_only_chunks_whose_hash_is_right_are_kept(interrupted, build, damage, whole_chunks):
    path, part, firsts, calls, whole = interrupted
    damage(part)
    store = build(path)
    assert calls[0] == firsts[whole_chunks] and store.content == whole
    store.verify()


def test_a_worker_that_is_killed_costs_nothing_of_what_was_tokenised(monkeypatch, small, build, tmp_path):
    calls, encode, outcome = [], Encoder.__call__, tmp_path / "outcome"

    def killed(self, raws, first_index):
        calls.append(first_index)
        if len(calls) == 4:
            raise BrokenProcessPool("as when a worker ends")
        return encode(self, raws, first_index)
    monkeypatch.setattr(Encoder, "__call__", killed)
    monkeypatch.setenv("MINIMIND_DS_OUTCOME", str(outcome))
    path = write_lines(tmp_path / "talks.jsonl", map(talk, range(400)))
    with pytest.raises(DataError, match="a process that tokenised was killed .out of memory.*is kept"):
        build(path)
    # A batch script learns that this start has brought something.
    assert outcome.read_text() == "tokenised\n"
    build(path)
    assert calls[4] == calls[3]


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(build, small, tmp_path, capsys):
    path = write_lines(tmp_path / "talks.jsonl", map(talk, range(400)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write beyond it, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be written to .*cache: File too large; name another folder with"):
            build(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(build(path)) == 400 and "going on after" in capsys.readouterr().err


def test_what_was_left_long_ago_is_deleted_unless_another_process_builds_it_or_it_is_gone_on_with(interrupted, build):
    path, part, firsts, calls, _ = interrupted
    lately, kept, dead, lockless = (part.with_name(f".{name}.part") for name in ("lately", "kept", "dead", "no.lock"))
    for other in (lately, kept, dead, lockless):
        other.mkdir()
        (other / "tokens.bin").write_bytes(b"x")
        if other is not lockless:
            other.with_suffix(".lock").touch()
        if other is not lately:
            for old in (other / "tokens.bin", other):
                os.utime(old, times=(0, time.time() - build_module.FORGOTTEN_S - 9))
    for old in (*part.iterdir(), part):
        os.utime(old, (0, 0))
    with kept.with_suffix(".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        build(path)
    assert calls[0] == firsts[5] and not part.exists()
    assert [other.exists() for other in (lately, kept, dead, lockless)] == [True, True, False, False]


def test_a_file_that_changed_after_the_interruption_is_tokenised_from_its_start(interrupted, build):
    path, _, _, calls, _ = interrupted
    write_lines(path, map(talk, range(1, 401)))
    calls.append(None)
    build(path)
    assert calls[1] == 0


def bad_here_and_there(numbers):
    """Records with keys that mean nothing, some of them bad."""
    return [{"text": "for pretraining"} if n % 7 == 3 else {**talk(n), f"key{n}": 1} for n in numbers]


@pytest.mark.parametrize("container", ["lines", "array"])
def test_bad_records_are_named_and_counted_alike_however_many_processes_parse_them(container, monkeypatch, build, tok,
                                                                                     tmp_path):
    monkeypatch.setattr(tokenise, "CHUNK_RECORDS", 50)
    records, options = bad_here_and_there(range(400)), {"random_system_ratio": 0.5, "seed": 1}
    path = tmp_path / "data.json"
    path.write_text("\n".join(map(json.dumps, records)) if container == "lines" else json.dumps(records, indent=1))
    stores = []
    for workers in (0, 2):
        folder = tmp_path / f"{workers}"
        with pytest.raises(DataError, match="line 4: " if container == "lines" else "record 4 .line [0-9]+.: "):
            build(path, workers=workers, cache_dir=folder)
        assert all(left.name.endswith(".lock") for left in folder.iterdir())
        stores.append(build(path, workers=workers, cache_dir=folder, on_bad_record="skip", options=options,
                            max_seq_len=256))
    one, two = stores
    assert one.content == two.content and one.stats == two.stats and (one.lines == two.lines).all()
    assert (one.stats["records"], one.stats["skipped"], one.stats["lines"]) == (343, 57, 400)
    kept = [n for n in range(400) if n % 7 != 3]
    assert one.lines.tolist() == [n + 1 for n in kept]
    # The random touches are of a record's place in the file.
    for i, n in enumerate(kept):
        assert one[i].input_ids.tolist() == build_sample(talk(n), tok, 256, augment=Augment(1, 0, 0.5, 0), index=n
                                                         ).input_ids.tolist()
    ignored = {name: count for name, count in one.stats.items() if name.startswith(IGNORED)}
    assert len(ignored) == MOST_NAMES + 1 and sum(ignored.values()) == 343


def test_what_is_wrong_first_is_said_though_the_file_breaks_off_later(build, tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in bad_here_and_there(range(60))).encode()
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-20])
    for policy, said in (("stop", "line 4: "), ("skip", "is damaged or cut off")):
        with pytest.raises(DataError, match=said):
            build(path, on_bad_record=policy)


def test_a_file_without_one_good_record_is_refused_with_the_first_bad_one(build, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"text": "a"}] * 5)
    with pytest.raises(DataError, match="holds no record: all 5 are bad; .*data.jsonl line 1: "):
        build(path, on_bad_record="skip")


@pytest.mark.parametrize("depth", [99, 101, 600, 900])
def test_a_record_that_is_nested_too_deeply_to_be_sent_is_named(depth, build, tmp_path):
    record = {**talk(1), "more": json.loads("[" * (depth - 1) + "]" * (depth - 1))}
    path = tmp_path / "nested.json"
    path.write_text(json.dumps([talk(0), record]))
    for workers in (0, 2):
        if depth < 100:
            assert len(build(path, workers=workers, cache_dir=tmp_path / f"{workers}")) == 2
        else:
            with pytest.raises(DataError, match="record 2 .line 1.: it is nested too deeply"):
                build(path, workers=workers)


# Verified


def test_a_block_that_changed_is_noticed_when_a_sample_is_first_read_from_it_and_built_again(small, build, tmp_path,
                                                                                              capsys):
    path = write_lines(tmp_path / "many.jsonl", map(talk, range(400)))
    first = build(path)
    n_blocks = len(first.tokens.checked)
    assert n_blocks > 3
    content = first.read(range(len(first)))[0]
    for at in (4096, 2 * 4096 + 17):
        store = build(path)
        flip_bit(store.folder / "tokens.bin", at)
        store = build(path)
        begins = store.starts * store.tokens.dtype.itemsize
        touched = (begins // 4096 <= at // 4096) & ((begins + store.lengths * store.tokens.dtype.itemsize - 1) // 4096
                                                    >= at // 4096)
        untouched = np.flatnonzero(~touched)
        store.read(untouched)
        for index in np.flatnonzero(touched)[[0, -1]]:
            with pytest.raises(DataError, match=f"damaged: block {at // 4096} of tokens.bin changed"):
                store.read([int(index)])
        again = build(path)
        assert "damaged; building it again" in capsys.readouterr().err
        assert again.read(range(len(again)))[0].tolist() == content.tolist()
        assert again.tokens.checked.all()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("given_away", ["folder", "tokens.bin", "meta.json"])
def test_what_another_user_left_in_the_default_folder_is_refused(build, tmp_path, monkeypatch, given_away):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = tmp_path / "minimind_ds"
    path = write_lines(tmp_path / "talks.jsonl", map(talk, range(20)))
    stores = [build(path, cache_dir=folder) for folder in (default, tmp_path / "named")]
    for store in stores:
        os.chown(store.folder if given_away == "folder" else store.folder / given_away, 65534, 65534)
    with pytest.raises(UserError, match="belongs to another user .uid 65534.: delete it, or name a folder"):
        build(path, cache_dir=default)
    assert build(path, cache_dir=tmp_path / "named").content == stores[1].content


def test_a_lock_that_is_a_link_is_not_followed(build, tmp_path):
    path = write_lines(tmp_path / "talks.jsonl", map(talk, range(20)))
    store = build(path)
    lock = store.folder.with_name(f".{store.folder.name}.lock")
    lock.unlink()
    (store.folder / "meta.json").unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="cannot be written"):
        build(path)
    assert not (tmp_path / "elsewhere").exists()


PRETRAIN = ["--deepspeed", "ds_configs/zero0.json", "--preset", "debug", "--max_seq_len", "512", "--pack_len", "512",
            "--max_steps", "2", "--batch_size", "8", "--dtype", "fp32", "--save_interval", "0", "--from_resume",
            "none"]


def test_a_run_ends_before_it_trains_on_a_changed_block_and_the_next_one_mends_it(tmp_path):
    (tmp_path / "model.yaml").write_text("model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
                                         "num_key_value_heads: 1, intermediate_size: 64}\n")
    path = write_lines(tmp_path / "texts.jsonl", [{"text": f"{i} " + "a b c d " * 1200} for i in range(340)])
    words = [sys.executable, "launch/pretrain.py", *PRETRAIN, "--data_path", str(path), "--save_dir",
             str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"), "--config", str(tmp_path / "model.yaml")]

    def run():
        return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run().returncode == 0
    tokens = next((tmp_path / "cache").glob("texts-*/tokens.bin"))
    size = tokens.stat().st_size
    assert size > 3 << 20
    content = bytearray(tokens.read_bytes())
    # All blocks but the two that are looked at when it is opened.
    for at in range(1 << 20, size // (1 << 20) * (1 << 20), 1 << 20):
        content[at + 99] ^= 1
    tokens.write_bytes(content)
    done = run()
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1 and "of tokens.bin changed" in said[0], done.stderr
    assert "Traceback" not in done.stderr
    assert '"loss"' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    done = run()
    assert done.returncode == 0 and "damaged; building it again" in done.stderr


# Processes, memory, progress


def test_the_cores_a_process_may_use_are_counted(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(5)))
    monkeypatch.setattr(tokenise, "Path", lambda path: quota)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    # Affinity alone; a cgroup without a limit, with two and a half cores, with less than one; SLURM's share.
    assert usable_cores() == 5
    for text, cores in (("max 100000", 5), ("250000 100000", 3), ("50000 100000", 1)):
        quota.write_text(text + "\n")
        assert usable_cores() == cores
    quota.unlink()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert usable_cores() == 2
    monkeypatch.setattr(tokenise, "usable_cores", lambda: 8)
    assert worker_count(1 << 20) == 0 and worker_count(5 * tokenise.BYTES_PER_WORKER) == 5
    assert worker_count(1 << 40) == 8 and worker_count(1, 3) == 3 and worker_count(1 << 40, 10**9) == 16


def test_chunks_are_bounded_by_their_text_and_not_only_by_their_records(small):
    def batches(raws):
        return list(tokenise.batches(RecordFile(Path("any"), "", "line", lambda _: ((i, i, raw) for i, raw in raws))))
    sizes = [batch.size for batch in batches((i, b"x" * n) for i, n in enumerate([10] * 500 + [5000, 3]))]
    assert all(2000 <= size < 2010 for size in sizes[:2]) and sizes[-2] >= 5000 and sizes[-1] == 3
    many = batches((i, b"") for i in range(tokenise.CHUNK_RECORDS + 1))
    assert [(batch.first_index, len(batch.raws)) for batch in many] == [(0, 2000), (2000, 1)]


def test_lines_of_a_megabyte_are_tokenised_in_bounded_memory(tmp_path, tok):
    import psutil
    text = "".join(f"The number {i} is not {i + 1}. " for i in range(38_000))[:1_000_000]
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for i in range(24):
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    process, most, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.05):
            most[0] = max(most[0], process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    store = open_or_build(path, tok, kind="text", max_seq_len=768, policy="split", cache_dir=tmp_path / "cache")
    done.set()
    watcher.join()
    assert store.stats["records"] == 24 and store.stats["lost_tokens"] == 0
    assert most[0] - before < 1 << 30


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(tokenise.time, "monotonic", lambda: now[0])
    progress = Progress("talks.jsonl", 260_000_000, True)
    progress.at(20_000_000)
    for at in range(1, 4):
        now[0] += 25
        progress.at(20_000_000 + at * 50_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "tokenising talks.jsonl: 46% of 260 MB, 2.0 MB/s, 70 s left"]
    now[0] += 5.1
    progress.at(260_000_000)
    assert "100% of 260 MB, 3.0 MB/s, 0 s left" in capsys.readouterr().err
    hidden = Progress("talks.jsonl", 1, False)
    now[0] += 99
    hidden.at(1)
    assert not capsys.readouterr().err


def test_a_process_that_waits_for_the_builder_tells_how_far_it_is(interrupted):
    _, part, *_ = interrupted
    entry = json.loads((part / JOURNAL).read_text().splitlines()[-1])
    assert position_of(part) == entry["stats"]["position"] > 0
    assert position_of(part / "nowhere") == 0
