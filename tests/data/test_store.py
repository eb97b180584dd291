"""The token cache: right, found again, never half-way, never trusted when damaged.

    python -m pytest tests/data/test_store.py
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from minimind_ds.data.conversation import DataError, read_records
from minimind_ds.data.sample import Augment, build_sample, build_text_sample
from minimind_ds.data.store import open_or_build
from minimind_ds.data.tokenizer import load_tokenizer
from tests.conftest import ROOT, environment
from tests.waiting import until


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(None)


def talk(i, answer="It is {i}, as ever. 答案是 {i}。"):
    turns = [{"role": "user", "content": f"What is {i}? " + "Tell me. " * (i % 7)},
             {"role": "assistant", "content": answer.format(i=i)}]
    return {"conversations": turns}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "talks.jsonl", map(talk, range(60)))


@pytest.fixture
def build(tok, tmp_path):
    def build(path, **changes):
        return open_or_build(path, tok, **{"kind": "conversations", "max_seq_len": 64, "cache_dir": tmp_path / "cache",
                                           **changes})
    return build


def built_at(store):
    return (store.folder / "meta.json").stat().st_ino


def test_the_store_holds_what_build_sample_makes_one_by_one(data, build, tok):
    store = build(data, max_seq_len=58)
    assert len(store) == 60 and store.stats["cut"] > 0
    assert all(tensor.dtype.is_signed for tensor in (store[0].input_ids, store[0].labels))
    for i, (line, record) in enumerate(read_records(data, "conversations")):
        expected = build_sample(record, tok, 58)
        assert store[i].input_ids.tolist() == expected.input_ids.tolist()
        assert store[i].labels.tolist() == expected.labels.tolist()
        assert store.lines[i] == line and store.lengths[i] == len(expected.input_ids)
        assert store.labelled[i] == (expected.labels >= 0).sum()
    assert store.stats["tokens"] == store.lengths.sum() and store.stats["labelled"] == store.labelled.sum()


def test_texts_are_stored_too(tmp_path, build, tok):
    texts = ["One two three.", "四五六", "seven " * 90]
    store = build(write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts]), kind="text")
    for i, text in enumerate(texts):
        expected = build_text_sample(text, tok, 64)
        assert store[i].input_ids.tolist() == expected.input_ids.tolist()
        assert store[i].labels.tolist() == expected.labels.tolist()


def test_a_vocabulary_beyond_15_bits_is_stored_in_32(data, build, tok, tmp_path):
    wide = copy.copy(tok)
    wide.vocab_size, wide.fingerprint = 100_000, "wide"
    store, narrow = open_or_build(data, wide, kind="conversations", max_seq_len=64, cache_dir=tmp_path), build(data)
    assert store.tokens.dtype == np.uint32 and narrow.tokens.dtype == np.uint16
    assert all(store[i].labels.tolist() == narrow[i].labels.tolist() for i in range(60))


def test_several_processes_and_chunks_build_the_same(tmp_path, build, tok):
    data = write_lines(tmp_path / "many.jsonl", map(talk, range(2100)))
    one = build(data)
    shutil.rmtree(one.folder)
    two = build(data, workers=10**9)
    assert two.content == one.content and (two.lines == one.lines).all() and two.stats == one.stats
    assert two.lines.tolist() == list(range(1, 2101))


def test_a_second_open_reuses_the_cache(data, build):
    first = build(data)
    second = build(data)
    assert built_at(first) == built_at(second) and first.content == second.content
    second.verify()


@pytest.mark.parametrize("changes", [{"max_seq_len": 65}, {"policy": "drop"},
                                     {"options": {"random_system_ratio": 0.5, "seed": 1, "epoch": 0}}])
def test_other_settings_have_a_cache_of_their_own(data, build, changes):
    assert build(data).folder != build(data, **changes).folder


def test_options_that_draw_each_epoch_have_a_cache_for_each_and_match_build_sample(data, build, tok):
    options = {"random_system_ratio": 0.5, "drop_empty_think_ratio": 0.5, "seed": 3}
    stores = [build(data, options={**options, "epoch": epoch}) for epoch in (0, 1)]
    assert stores[0].folder != stores[1].folder
    for epoch, store in enumerate(stores):
        augment = Augment(3, epoch, 0.5, 0.5)
        for i, (_, record) in enumerate(read_records(data, "conversations")):
            assert store[i].input_ids.tolist() == build_sample(record, tok, 64, augment=augment, index=i
                                                               ).input_ids.tolist()


def test_options_that_are_off_do_not_split_the_cache(data, build):
    assert build(data).folder == build(data, options={"seed": 9, "epoch": 4}).folder


def test_an_unknown_option_is_an_error(data, build):
    with pytest.raises(ValueError, match="unknown data option 'sede'"):
        build(data, options={"sede": 1})


def test_a_changed_file_is_tokenised_again_even_with_its_size_and_time_kept(data, build):
    first = build(data)
    before, text = data.stat(), data.read_text(encoding="utf-8")
    data.write_text(text.replace("What is 7?", "What is 8?"), encoding="utf-8")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = build(data)
    assert data.stat().st_size == before.st_size
    assert second.folder != first.folder and second.content != first.content


def test_the_same_data_elsewhere_has_the_same_content(data, build, tmp_path):
    twin = tmp_path / "copy.jsonl"
    shutil.copy(data, twin)
    assert build(twin).content == build(data).content


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda folder: flip_bit(folder / "meta.json", 40),
    lambda folder: (folder / "meta.json").write_text("{}"),
    lambda folder: (folder / "meta.json").write_text("[1, 2"),
    lambda folder: (folder / "meta.json").unlink(),
    lambda folder: replace(folder / "meta.json", '"cut": ', '"cut": 1'),
    lambda folder: flip_bit(folder / "tokens.bin", 10),
    lambda folder: flip_bit(folder / "offsets.bin", -3),
    lambda folder: os.truncate(folder / "tokens.bin", 100),
    lambda folder: os.truncate(folder / "lines.bin", 0),
    lambda folder: (folder / "labelled.bin").unlink(),
], ids=["bit", "empty", "torn", "no_meta", "statistics", "token", "offset", "cut_short", "emptied", "file_gone"])
def test_a_damaged_cache_is_built_again_and_said_so(data, build, damage, capsys):
    first = build(data)
    content = first.content
    damage(first.folder)
    second = build(data)
    assert capsys.readouterr().err.count("damaged; building it again") == 1
    assert second.content == content
    second.verify()


def test_verify_finds_a_changed_bit_anywhere(tmp_path, build):
    store = build(write_lines(tmp_path / "many.jsonl", map(talk, range(2500))))
    middle = (store.folder / "tokens.bin").stat().st_size // 2
    assert middle > 64 << 10
    flip_bit(store.folder / "tokens.bin", middle)
    with pytest.raises(DataError, match="damaged"):
        store.verify()


def test_a_cache_that_is_cut_short_under_a_run_is_one_line_and_no_signal(data, build):
    store = build(data)
    first = store[0]
    os.truncate(store.folder / "tokens.bin", 0)
    with pytest.raises(DataError, match="tokens.bin ends at byte 0; it is built again at the next start"):
        store[0]
    assert torch.equal(build(data)[0].input_ids, first.input_ids)


def program(data, cache):
    return ("from minimind_ds.data.store import open_or_build; from minimind_ds.data.tokenizer import load_tokenizer\n"
            f"store = open_or_build({str(data)!r}, load_tokenizer(None), kind='conversations', max_seq_len=64, "
            f"cache_dir={str(cache)!r})\nprint(len(store), store.content)")


def start(data, cache):
    return subprocess.Popen([sys.executable, "-c", program(data, cache)], cwd=ROOT, env=environment(),
                            stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_one_cache(tmp_path):
    data = write_lines(tmp_path / "many.jsonl", map(talk, range(3000)))
    both = [start(data, tmp_path / "cache") for _ in range(2)]
    answers = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1] and answers[0].startswith("3000 ")
    assert len(visible(tmp_path / "cache")) == 1 and not list((tmp_path / "cache").glob(".*.part"))


def visible(folder):
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def test_a_builder_killed_half_way_leaves_nothing_that_is_used(tmp_path, build):
    data = write_lines(tmp_path / "many.jsonl", map(talk, range(9000)))
    process = start(data, tmp_path / "cache")
    until(lambda: any((tmp_path / "cache").glob(".*.part/tokens.bin")), "a half-written store", [process])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not visible(tmp_path / "cache") and list((tmp_path / "cache").glob(".*.part"))
    assert len(build(data)) == 9000
    assert not list((tmp_path / "cache").glob(".*.part"))


LONG_QUESTION = {"conversations": [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "x"}]}


def test_data_without_one_labelled_token_is_an_error_and_nothing_is_written(tmp_path, build):
    data = write_lines(tmp_path / "none.jsonl", [LONG_QUESTION] * 2)
    with pytest.raises(DataError, match="none.jsonl has not one labelled token: 2 samples have no label, of which 2 "
                                        r"were cut, .*; --max_seq_len \d+ keeps all of them whole"):
        build(data)
    with pytest.raises(DataError, match="2 are longer than 64 tokens and dropped"):
        build(data, policy="drop")
    assert not visible(tmp_path / "cache") and not list((tmp_path / "cache").glob(".*.part"))


def test_dropped_cut_unlabelled_and_malformed_records_are_counted(tmp_path, build):
    data = write_lines(tmp_path / "mixed.jsonl", [talk(1), LONG_QUESTION, {"conversations": 3}, talk(2, "y " * 100)])
    store = build(data, on_bad_record="skip")
    counts = {key: store.stats[key] for key in ("records", "cut", "dropped", "unlabelled", "skipped", "samples")}
    assert counts == {"records": 3, "cut": 1, "dropped": 0, "unlabelled": 1, "skipped": 1, "samples": 2}
    assert store.lines.tolist() == [1, 4]
    dropped = build(data, on_bad_record="skip", policy="drop")
    assert dropped.stats["dropped"] == 2 and dropped.lines.tolist() == [1]


def test_a_bad_record_stops_the_build_and_nothing_is_written(tmp_path, build):
    data = write_lines(tmp_path / "bad.jsonl", [talk(1), {"conversations": 3}])
    with pytest.raises(DataError, match="bad.jsonl line 2"):
        build(data)
    assert not visible(tmp_path / "cache") and not list((tmp_path / "cache").glob(".*.part"))


def test_a_cache_folder_that_cannot_be_written_is_one_clear_error(data, build, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="token cache cannot be written to .*file"):
        build(data, cache_dir=tmp_path / "file" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_folder_is_one_clear_error_but_what_it_holds_is_used(data, build, tmp_path):
    build(data)
    (tmp_path / "cache").chmod(0o555)
    assert len(build(data)) == 60
    with pytest.raises(DataError, match="cannot be written"):
        build(data, max_seq_len=65)
    (tmp_path / "cache").chmod(0o755)


def test_a_missing_file_is_named(build, tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl does not exist"):
        build(tmp_path / "nowhere.jsonl")


def test_a_split_shares_no_sample_and_loses_none(data, build):
    store = build(data)
    for seed in range(5):
        train, held = store.split(0.1, seed)
        assert len(held) == 6 and sorted([*train.lines, *held.lines]) == store.lines.tolist()
        assert held[0].input_ids.tolist() == store[int(held.lines[0]) - 1].input_ids.tolist()
    again = store.split(0.1, 4)
    assert again[1].lines.tolist() == held.lines.tolist() and again[0].content == train.content
    assert len({train.content, held.content, store.content, store.split(0.1, 5)[0].content}) == 4


def test_a_split_holds_out_at_least_one_sample_and_never_all(data, build, tmp_path):
    assert len(build(data).split(1e-6, 0)[1]) == 1
    two = build(write_lines(tmp_path / "two.jsonl", map(talk, range(2))))
    assert [len(part) for part in two.split(0.99, 0)] == [1, 1]
    with pytest.raises(ValueError, match="at least 2"):
        build(write_lines(tmp_path / "one.jsonl", [talk(0)])).split(0.5, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        two.split(1.0, 0)


def test_every_epochs_store_is_split_alike_whatever_became_of_single_lines(tmp_path, build):
    # The system prompt drawn in some epochs pushes short answers past max_seq_len, so that samples come and go.
    data = write_lines(tmp_path / "edge.jsonl", map(talk, range(200)))
    options = {"random_system_ratio": 0.5, "seed": 3}
    stores = [build(data, max_seq_len=32, options={**options, "epoch": epoch}) for epoch in range(3)]
    assert len({len(store) for store in stores}) > 1
    parts = [store.split(0.2, 0) for store in stores]
    assert not set().union(*(train.lines.tolist() for train, _ in parts)) & set().union(
        *(held.lines.tolist() for _, held in parts))
