"""Several files as one set: found, named, mixed by shares, told apart in messages, split where too long.

    python -m pytest tests/data/test_sources.py
"""

import json
import os
import socket
from collections import Counter

import numpy as np
import pytest

from minimind_ds.config.errors import UserError
from minimind_ds.config.run import of_paths, parse_run_config
from minimind_ds.data import files
from minimind_ds.data.conversation import DataError
from minimind_ds.data.files import expand, short_names
from minimind_ds.data.loader import epoch_plan, load_micro_batch
from minimind_ds.data.sources import content_change, deal, mix, what_is_lost
from minimind_ds.data.store import open_or_build
from minimind_ds.data.tokenizer import load_tokenizer
from tests.data.test_store import talk, write_lines


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(None)


@pytest.fixture(scope="module")
def mixture(tok, tmp_path_factory):
    """mixture(shares, epoch): three files of 20, 30 and 41 conversations."""
    folder, sizes = tmp_path_factory.mktemp("mixture"), (20, 30, 41)
    for name, first, n in zip("abc", (0, 100, 200), sizes):
        write_lines(folder / f"{name}.jsonl", map(talk, range(first, first + n)))

    def made(shares, epoch=0, seed=0):
        sources = expand([{"path": str(folder / f"{name}.jsonl"), "share": share} for name, share in
                          zip("abc", shares)])
        stores = [open_or_build(source.path, tok, kind="conversations", max_seq_len=64, cache_dir=folder / "cache")
                  for source in sources]
        return mix(sources, stores, seed, epoch)
    return made


# What names the files


def test_paths_globs_and_folders_are_read_in_sorted_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/d.json", "sub/c.jsonl.gz", "README.md", ".hidden.jsonl", "x,y.jsonl",
                 "[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(given):
        return [str(source.path.relative_to(tmp_path)) for source in expand(given)]
    assert found(str(tmp_path)) == ["[1].jsonl", "a.jsonl", "b.jsonl", "sub/c.jsonl.gz", "sub/d.json", "x,y.jsonl"]
    assert found(f"{tmp_path}/?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found([f"{tmp_path}/b.jsonl", f"{tmp_path}/sub"]) == ["b.jsonl", "sub/c.jsonl.gz", "sub/d.json"]
    # A comma and a bracket belong to the name of a file that is there.
    assert found(f"{tmp_path}/x,y.jsonl") == ["x,y.jsonl"] and found(f"{tmp_path}/[1].jsonl") == ["[1].jsonl"]
    assert found([f"{tmp_path}/README.md"]) == ["README.md"]


def test_what_is_no_file_is_one_line_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "empty").mkdir()
    for given, said in (("pipe.jsonl", "is a named pipe"), ("socket", "is a socket"), ("/dev/zero", "is a device"),
                        ("empty", "holds no data file"), ("*.txt", "matches no file"), ("x.jsonl", "does not exist"),
                        ("n" * 300, "cannot be read"), ("a\0", "cannot be read"), ("", "pipe.jsonl is a named pipe")):
        with pytest.raises(DataError, match=said) as error:
            expand(os.path.join(tmp_path, given))
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(DataError, match="several files are separated by spaces"):
        expand(f"{tmp_path}/a.jsonl,{tmp_path}/a.jsonl")
    with pytest.raises(DataError, match=r"/sft_trian.jsonl does not exist; did you mean .*/sft_train.jsonl\?$"):
        (tmp_path / "sft_train.jsonl").write_text("x")
        expand(f"{tmp_path}/sft_trian.jsonl")
    with pytest.raises(DataError, match="named twice; a share of 2"):
        expand([f"{tmp_path}/a.jsonl", f"{tmp_path}/a.json*"])


def test_a_sample_seen_again_is_the_same_sample(mixture):
    places = [[made.place_of(i) for i in range(len(made))] for made in (mixture((2, 1, 1)), mixture((1, 1, 1)))]
    assert len(places[0]) == 20 + len(places[1]) and set(places[0]) == set(places[1])
    assert len(set(places[1])) == len(places[1])


def test_names_are_short_and_no_two_are_alike(tmp_path):
    paths = [tmp_path / name for name in ("x/train.jsonl", "y/train.jsonl.gz", "x/test.jsonl", "x/test.json")]
    assert short_names(paths[:1]) == ["train"] and short_names(paths[:2]) == ["x/train", "y/train"]
    assert len(set(short_names(paths))) == 4


def test_a_run_takes_paths_on_the_command_line_and_shares_in_yaml(tmp_path):
    def parsed(yaml_text, *words):
        (tmp_path / "run.yaml").write_text(yaml_text)
        return parse_run_config(["--config", str(tmp_path / "run.yaml"), *words], "sft", {"data_path": "bundled"})
    assert parsed("seed: 1").data_path == "bundled"
    assert parsed("seed: 1", "--data_path", "a", "b,c").data_path == ["a", "b,c"]
    assert parsed("data_path: a").data_path == parsed("data_path: [a]").data_path == "a"
    run = parsed("data_path: [a, {path: b, share: 2}, {path: c, share: 0.5}]")
    assert run.data_path == ["a", {"path": "b", "share": 2}, {"path": "c", "share": 0.5}]
    assert run.data_names == "a, b, c"
    assert parsed(run.to_yaml()).data_path == of_paths(os.path.abspath, run.data_path)
    assert parsed("num_workers: auto").num_workers is None and parsed("num_workers: 3").num_workers == 3
    assert parsed("seed: 1", "--num_workers", "auto").num_workers is None
    for wrong, said in (("{path: b, share: 0}", "above 0"), ("{path: b, share: .nan}", "above 0"), ("7", "not a path"),
                        ("{path: b, weight: 2}", "an entry is a path"), ("{share: 2}", "an entry is a path"),
                        ("{path: b, share: true}", "above 0")):
        with pytest.raises(UserError, match=said):
            parsed(f"data_path: [{wrong}]")
    with pytest.raises(UserError, match="not a path"):
        parsed("eval_path: [{path: b, share: 2}]")


# Shares


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 1, 1.5, 2, 3])
def test_after_any_epoch_each_sample_was_seen_as_often_as_its_share_says(share):
    n, seen = 41, np.zeros(41, dtype=int)
    for epoch in range(20):
        now = np.bincount(deal(n, share, epoch, 3, 1), minlength=n)
        assert now.min() >= int(share) and now.max() <= -(-share // 1), "within an epoch, give or take one"
        seen += now
        assert abs(seen - share * (epoch + 1)).max() < 1
        assert abs(seen.sum() - share * n * (epoch + 1)) <= 0.5
    if share * 20 == int(share * 20):
        assert set(seen) == {int(share * 20)}


def test_a_half_is_drawn_anew_each_epoch_by_the_seed():
    halves = [deal(1000, 0.5, epoch, 0, 0) for epoch in range(2)]
    assert not set(halves[0]) & set(halves[1]) and np.diff(halves[0]).max() > 1
    assert deal(1000, 0.5, 0, 1, 0).tolist() != halves[0].tolist() != deal(1000, 0.5, 0, 0, 1).tolist()


def test_a_plan_holds_each_sample_as_often_as_its_share_says(mixture):
    both = Counter()
    for epoch in range(2):
        store = mixture((1, 2, 0.5), epoch)
        plan = epoch_plan(store.lengths, store.labelled, pack_len=128, rows_per_step=4, seed=0, epoch=epoch)
        indices = [i for step in range(len(plan)) for row in plan.rows(step) for i in row]
        assert sorted(indices) == list(range(len(store)))
        both.update((int(of), int(line)) for of, line in zip(store.source_of(indices), store.lines[indices]))
    assert both == {**{(0, line): 2 for line in range(1, 21)}, **{(1, line): 4 for line in range(1, 31)},
                    **{(2, line): 1 for line in range(1, 42)}}


def test_a_mixture_reads_what_its_stores_hold_in_any_order(mixture, tok):
    store = mixture((1.5, 2, 0.5))
    indices = np.random.default_rng(0).permutation(len(store))
    ids, labels = store.read(indices)
    at = 0
    for index in indices:
        of = int(store.source_of([index])[0])
        expected = store.stores[of][int(store.lines[index]) - 1]
        end = at + len(expected.input_ids)
        assert ids[at:end].tolist() == expected.input_ids.tolist() == store[index].input_ids.tolist()
        assert labels[at:end].tolist() == expected.labels.tolist()
        assert store.lengths[index] == end - at and store.labelled[index] == (expected.labels >= 0).sum()
        at = end
    assert at == len(ids)
    part = store.subset(indices[:7], "some")
    assert sorted(map(tuple, (part[i].input_ids.tolist() for i in range(7)))) == sorted(
        tuple(store[i].input_ids.tolist()) for i in indices[:7])
    batch = load_micro_batch(store, [[0, len(store) - 1], []], 128, 0)
    assert batch.n_tokens == store.lengths[[0, len(store) - 1]].sum()


def test_samples_are_named_with_their_file_and_line(mixture):
    store = mixture((1, 2, 0.5))
    assert store.where([2, 0]).endswith("a.jsonl") and store.where([2, 0]).startswith("lines 1, 3 of ")
    first_of_c = int(store.bounds[2])
    said = store.where([0, first_of_c])
    assert said.startswith("line 1 of ") and f" and line {store.lines[first_of_c]} of " in said and "c.jsonl" in said
    assert "and 10 more" in store.where(range(int(store.bounds[1]), int(store.bounds[1]) + 60))


def test_the_table_gives_each_source_its_share_of_tokens_and_labels(mixture):
    rows = mixture((1, 2, 0.5)).table()
    assert [row["name"] for row in rows] == ["a", "b", "c"] and [row["samples"] for row in rows] == [20, 60, 21]
    assert sum(row["share_of_tokens"] for row in rows) == pytest.approx(1)
    assert rows[1]["tokens"] == 2 * rows[1]["file"]["tokens"]
    json.dumps(rows)


def test_what_a_resume_compares_names_what_changed(mixture):
    alone, several = mixture((1, 1, 1)).parts()[0][1], mixture((1, 2, 0.5))
    # Checkpoints of one plain file from before there were several hold the hash of its tokens.
    assert alone.content == alone.stores[0].content
    then = json.loads(json.dumps(several.content))
    assert then == several.content
    assert "b.jsonl with share 2, this run with 3" in content_change(then, mixture((1, 3, 0.5)).content)
    assert "it read c.jsonl, which this run does not" == content_change(then, then[:2])
    assert "it did not read a.jsonl" == content_change(then[1:], then)
    assert "in that order" in content_change(then, then[::-1])
    changed = [[name, "other" if name == "b.jsonl" else content, share] for name, content, share in then]
    assert content_change(then, changed) == "b.jsonl has changed since"


# Long texts


def test_a_split_text_is_learnt_token_by_token_each_once(tok, tmp_path):
    texts = [f"{i} " + "word and word " * i for i in range(60)] + ["", "x"]
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    for most in (2, 3, 17, 64):
        store = open_or_build(path, tok, kind="text", max_seq_len=most, policy="split", cache_dir=tmp_path / "cache")
        whole = {n: [tok.bos_id, *tok.encode(text), tok.eos_id] for n, text in enumerate(texts, 1)}
        learnt = {n: [] for n in whole}
        for index in range(len(store)):
            sample, line = store[index], int(store.lines[index])
            assert 2 <= len(sample.input_ids) <= most
            assert sample.labels[:-1].tolist() == sample.input_ids[1:].tolist() and sample.labels[-1] == -100
            # The context of a piece is the token that the piece before learnt last.
            assert not learnt[line] or learnt[line][-1] == int(sample.input_ids[0])
            learnt[line] += sample.labels[:-1].tolist()
        assert {n: ids[:1] + learnt[n] for n, ids in whole.items()} == whole
        assert store.stats["lost_tokens"] == 0
        assert store.stats["labelled"] == sum(len(ids) - 1 for ids in whole.values())
        assert store.stats["split"] == sum(len(ids) > most for ids in whole.values())


@pytest.mark.parametrize("tokenizer, tokens", [(None, 550_779), ("minimind_tokenizer", 610_677)])
def test_every_token_of_real_documents_is_trained_once_with_split_and_the_loss_is_told_with_cut(shared, tmp_path,
                                                                                                tokenizer, tokens):
    tok, path = load_tokenizer(tokenizer and shared / tokenizer), shared / "data" / "pretrain_en.jsonl"
    common = dict(kind="text", max_seq_len=768, cache_dir=tmp_path)
    store = open_or_build(path, tok, policy="split", **common)
    plan = epoch_plan(store.lengths, store.labelled, pack_len=4096, rows_per_step=4, seed=0, epoch=0)
    learnt = 0
    for step in range(len(plan)):
        learnt += sum(int((store.read(row)[1] >= 0).sum()) for row in plan.rows(step))
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    every = sum(len(ids) for ids in tok.encode_batch(texts))
    # Each document's end is learnt, too.
    assert learnt == plan.n_labelled.sum() == every + len(texts) and every == tokens
    cut = open_or_build(path, tok, policy="cut", **common)
    assert cut.stats["labelled"] + cut.stats["lost_labelled"] == learnt
    said = what_is_lost(cut.stats, 768, "text")
    assert said.startswith(f"cut {cut.stats['cut']} of {len(texts)} texts: ") and "% of labelled tokens lost" in said
    keeps_all = int(said.split("--max_seq_len ")[1].split()[0])
    assert open_or_build(path, tok, policy="cut", **{**common, "max_seq_len": keeps_all}).stats["lost_tokens"] == 0


def test_what_is_cut_of_conversations_is_counted_and_the_length_that_keeps_all_is_named(tok, tmp_path):
    path = write_lines(tmp_path / "talks.jsonl", map(talk, range(60)))
    common = dict(kind="conversations", cache_dir=tmp_path / "cache")
    whole = open_or_build(path, tok, max_seq_len=1000, **common)
    for policy, word in (("cut", "cut"), ("drop", "dropped")):
        store = open_or_build(path, tok, max_seq_len=50, policy=policy, **common)
        stats = store.stats
        assert 0 < stats["too_long"] < 60
        assert stats["labelled"] + stats["lost_labelled"] == whole.stats["labelled"]
        assert stats["longest"] == whole.lengths.max()
        said = what_is_lost(stats, 50, "conversations")
        share = 100 * stats["lost_labelled"] / whole.stats["labelled"]
        assert said.startswith(f"{word} {stats['too_long']} of 60 conversations: {share:.1f} % of labelled tokens "
                               "lost")
        assert said.endswith("--max_seq_len 64 keeps all")
    assert what_is_lost(whole.stats, 1000, "conversations") == ""
    with pytest.raises(UserError, match="cannot be 'split' where there are conversations"):
        open_or_build(path, tok, max_seq_len=50, policy="split", **common)


def test_a_pattern_that_matches_a_whole_disk_is_refused(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text("{}")
    monkeypatch.setattr(files, "MOST_MATCHES", 3)
    with pytest.raises(DataError, match="matches more than 3 files"):
        expand(f"{tmp_path}/*")
    assert len(expand(f"{tmp_path}/[0-2].jsonl")) == 3
