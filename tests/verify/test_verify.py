"""launch/verify.py: what is right passes, on bundled and real data; each law that is broken fails under its name.

One start on two ranks runs all reports; the program itself runs once, as a single process.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from minimind_ds import load_tokenizer, verify
from minimind_ds.config.model import PRESETS
from minimind_ds.data import hf_folder
from minimind_ds.distributed.world import read_world
from minimind_ds.verify import data, faults, kernels_law, laws, operations, reduced_run, sensitivity, template
from minimind_ds.verify.checks import Check, apart, bits_apart, gradients_apart
from minimind_ds.verify.patching import replaced
from tests.conftest import ROOT, SHARED, environment
from tests.routes import assert_clear

pytestmark = pytest.mark.numeric

ZERO = {stage: ["--deepspeed", f"ds_configs/zero{stage}.json"] for stage in range(4)}
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96}
MOE = {"use_moe": True, "moe_intermediate_size": 48}
REAL = ("sft_gsm8k", "sft_instruct_en_zh", "sft_tools_en_zh")
# All three with --slow.
SLOW = REAL[:2]
SOUND = {"moe": [*ZERO[3], "--dtype", "bf16"]}
if SHARED.is_dir():
    SOUND |= {name: [*ZERO[2], "--tokenizer", str(SHARED / "minimind_tokenizer"), "--data_path",
                     str(SHARED / "data" / f"{name}.jsonl")] for name in REAL}
else:
    SOUND["bundled"] = ZERO[2]
# A deliberate error of minimind_ds/verify/faults.py, and flags -> the law that must fail, and all that may fail with
# it.  Labels and packing are tested below, without ranks.  A run in bf16 has its kernels checked in fp32 as well.
BROKEN = {"mean_of_means": (["mean_of_means", 0.01], [], "gradients", {"layout"}),
          "lost_moment": (["lost_moments", "one"], [], "resume", set()),
          "inexact_kernel": (["scaled_kernel", "swiglu", "sdpa", 1e-3], ["--dtype", "bf16"], "kernels", {"gradients"})}
# Sizes that the law of kernels has to see in each precision.
SEEN = {"fp32": 1e-5, "bf16": 3e-4}


@pytest.fixture(autouse=True)
def clear_routes():
    """Choices of the law of kernels are those of its first pass; the other laws' are looked at among the ranks."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory, deepspeed, request):
    out, slow = tmp_path_factory.mktemp("verify"), request.config.getoption("--slow")
    cases = [{"name": name, "flags": flags, "model": MOE if name == "moe" else {}, "breaks": None}
             for name, flags in SOUND.items() if slow or name not in SLOW]
    cases += [{"name": name, "flags": [*ZERO[2], *flags], "model": {}, "breaks": breaks}
              for name, (breaks, flags, _, _) in BROKEN.items()]
    done = deepspeed(2, "tests/distributed/ranks/verify_broken.py", str(out), json.dumps(cases))
    return {case["name"]: json.loads((out / f"{case['name']}.json").read_text()) for case in cases}, done.stdout


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
                                  for name in SOUND])
def test_every_law_holds_on_what_is_right(name, reports):
    report = reports[0][name]
    assert_clear(report["gaps"])
    assert report["ok"] and not report["failed"], [law for law in report["laws"] if not law["ok"]]
    assert {law["law"] for law in report["laws"]} == {"labels", "template", "gradients", "packing", "layout",
                                                      "kernels", "resume"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_law_fails_under_its_name(name, reports):
    *_, law, others = BROKEN[name]
    report = reports[0][name]
    assert not report["ok"]
    assert law in report["failed"] and set(report["failed"]) <= {law, *others}


def test_a_kernel_off_by_a_thousandth_is_named_in_bf16_and_in_fp32(reports):
    wrong = [found["what"] for found in reports[0]["inexact_kernel"]["laws"] if not found["ok"]]
    assert all(any(what.startswith(f"{dtype} swiglu") for what in wrong) for dtype in SEEN), wrong


def bench_of(tmp_path, *flags, **model) -> tuple[reduced_run.ReducedRun, str]:
    """A tiny run as launch/verify.py would measure it, in this process."""
    yaml = tmp_path / "run.yaml"
    yaml.write_text("preset: debug\nmodel: " + json.dumps({**TINY, **model}), encoding="utf-8")
    prepared, kind = verify.prepare_run(["--config", str(yaml), *ZERO[2], "--save_dir", str(tmp_path / "run"),
                                    "--cache_dir", str(tmp_path), *flags], read_world())
    return reduced_run.make_reduced_run(prepared, 200), kind


@pytest.mark.parametrize("dtype", SEEN)
@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "moe"])
def test_each_kernel_s_small_error_is_seen_and_none_where_there_is_none(model, dtype, tmp_path, monkeypatch):
    # A quarter of the elements, for the time it takes.
    monkeypatch.setattr(operations, "LEAST", 2**16)
    # In bf16 as on a GPU: activations in bf16 whatever this processor prefers.
    b, _ = bench_of(tmp_path, "--dtype", dtype, "--kernels", "activations=native", **model)
    calls, backends = {}, sensitivity.operations_of(b)
    found = kernels_law.in_precision(b, b.spec, dtype, calls)
    assert all(f.ok for f in found) and backends.keys() == {name for name, _ in calls}, found
    for name in {"moe", "route"} if model else backends:
        own = {key: some for key, some in calls.items() if key[0] == name}
        with faults.scaled_kernel(name, backends[name], SEEN[dtype]):
            found = operations.findings(own, dtype)
        assert not all(f.ok for f in found), found


def test_one_wrong_label_and_one_leaked_key_are_seen(tmp_path):
    b, kind = bench_of(tmp_path)
    line = int(b.prepared.stores[0].lines[0])
    assert all(f.ok for f in data.labels_law(b.prepared, kind))
    for fault in (*(faults.one_label(line, how) for how in ("changed", "lost", "added")), faults.shifted_labels()):
        with fault:
            assert verify.failed(data.labels_law(b.prepared, kind)) == ["labels"]
    assert all(f.ok for f in laws.packing_law(b))
    with faults.leaked_key("sdpa"):
        assert verify.failed(laws.packing_law(b)) == ["packing"]


def test_an_export_that_renders_otherwise_than_training_is_seen(tmp_path):
    folder = tmp_path / "tokenizer"
    load_tokenizer().save_hf(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("'user'", "'system'", 1)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizers = [folder, *([SHARED / "minimind_tokenizer"] if SHARED.is_dir() else [])]
    for flags in ([], *(["--tokenizer", str(path)] for path in tokenizers)):
        b, _ = bench_of(tmp_path, *flags)
        assert [f.measured for f in template.template_law(b.prepared)] == [0]
        with faults.lost_line_end():
            [wrong] = template.template_law(b.prepared)
        assert wrong.measured == 2 and wrong.what.endswith(": a prompt, a prompt after a tool's answer")
        if str(folder) in flags:
            with replaced(hf_folder, "exported_template", lambda own: own):
                assert verify.failed(template.template_law(b.prepared)) == ["template"]


def test_bisection_ends_at_the_size_from_which_on_an_error_is_found():
    asked = []
    found = sensitivity.threshold(lambda size: asked.append(size) or size >= 3e-5)
    assert 3e-5 <= found <= 3e-5 * sensitivity.CLOSE and len(asked) < 12
    assert sensitivity.threshold(lambda size: False) == float("inf")
    assert sensitivity.threshold(lambda size: None) is None


def test_samples_are_shown_with_what_is_learnt_in_brackets_where_there_is_no_terminal(reports):
    assert "assistant\n[<think>\n\n</think>\n\n" in reports[1] and "\x1b[32m" not in reports[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared folder's data")
def test_answers_cut_by_truncation_are_counted_and_warned_of(reports):
    report = reports[0]["sft_tools_en_zh"]
    assert 0 < report["data"]["cut_inside_answer"] <= report["data"]["cut"]
    assert any("cut inside an answer" in line for line in report["warnings"])
    # With --slow only.
    if "sft_gsm8k" in reports[0]:
        assert reports[0]["sft_gsm8k"]["data"]["cut"] == 0


def write(path, conversations) -> str:
    path.write_text("".join(json.dumps({"conversations": turns}) + "\n" if isinstance(turns, list) else turns
                            for turns in conversations), encoding="utf-8")
    return str(path)


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_program_warns_keeps_its_table_beside_the_run_and_ends_with_0(tmp_path):
    lines = [turns(f"question {i}", f"answer {i}") for i in range(12)]
    spoilt = [turns("question 0", "answer 0"), turns("long", "word " * 80), turns("too long " * 60, "never seen"),
              "{broken\n", turns("\x1b[31mred", "plain")]
    path = write(tmp_path / "data.jsonl", lines + spoilt)
    yaml = tmp_path / "run.yaml"
    yaml.write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 4, "
                    "num_key_value_heads: 2, intermediate_size: 96}\n")
    done = subprocess.run([sys.executable, "launch/verify.py", "--config", str(yaml), *ZERO[1], "--data_path", path,
                           "--save_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path), "--max_seq_len", "64",
                           "--samples", "17", "--epochs", "1.5", "--stop_after", "1"], cwd=ROOT,
                          env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "verify.json").read_text())
    said = " ".join(report["warnings"])
    assert report["ok"] and report["data"]["bad_records"] == 1 and "line 16" in said
    assert "cut inside an answer" in said and "have no label" in said and "never label the stop token" in said
    assert "stand there more than once" in said
    # What a file holds cannot command the terminal.
    assert "\\x1b[31mred" in done.stdout and "\x1b" not in done.stdout
    assert "every law holds" in done.stdout and not (tmp_path / "run" / ".verify").exists()


@pytest.mark.parametrize("flags, word", [
    ([], "--deepspeed is missing"), ([*ZERO[2], "--data_path", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ([*ZERO[2], "--tokens", "-1"], "--tokens is -1"), ([*ZERO[2], "--colour"], "unrecognized arguments"),
])
def test_a_mistake_is_one_line_and_exit_code_2(flags, word, tmp_path, capsys):
    try:
        code = verify.main(["--save_dir", str(tmp_path), *flags])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and word in said and len(said.strip().splitlines()) == 1, said


def test_answers_are_found_from_ids_whatever_users_type():
    tok = load_tokenizer()
    start, stop = tok.special_id("<|im_start|>"), tok.special_id("<|im_end|>")
    asked = [start, *tok.encode("user\n<|im_start|>assistant\nno"), stop, *tok.encode("\n")]
    said = [*tok.encode("yes"), stop, *tok.encode("\n")]
    ids = np.array([*asked, start, *tok.encode("assistant\n"), *said])
    [(mine, ended)] = data.answers(ids, tok)
    assert ended and ids[mine].tolist() == said
    [(mine, ended)] = data.answers(ids[:-len(said) + 1], tok)
    assert not ended and ids[mine].tolist() == said[:1]
    assert data.answers(ids[:-len(said)], tok) == []


def test_an_answer_learnt_against_the_files_word_is_seen(tmp_path):
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no", "weight": 0},
             {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes", "id": 1}]
    path.write_text("\n".join([json.dumps({"messages": turns})] * 4))
    b, kind = bench_of(tmp_path, "--data_path", str(path))
    assert all(f.ok for f in data.labels_law(b.prepared, kind))
    assert data.statistics(b.prepared, kind)["notes"] == [
        "keys of the data that mean nothing here, with how often they stand there: turn.id (4)"]
    path.write_text(path.read_text().replace(', "weight": 0', ""))
    assert [f.measured for f in data.labels_law(b.prepared, kind) if not f.ok] == [4, 4]
    b, kind = bench_of(tmp_path, "--data_path", str(path), "--learn", "last")
    assert all(f.ok for f in data.labels_law(b.prepared, kind))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_is_cut_down_to_one_of_its_architecture(preset):
    config = PRESETS[preset]
    cut, said = reduced_run.cut_down(config, 3e6)
    assert reduced_run.count(cut) <= 3e6 and said
    kept = ("num_attention_heads", "num_key_value_heads", "head_dim", "use_moe", "num_experts", "vocab_size",
            "qk_norm", "tie_word_embeddings")
    assert all(getattr(cut, name) == getattr(config, name) for name in kept)
    assert reduced_run.cut_down(config, 1e12) == (config, None)


def test_nothing_that_is_not_a_number_passes():
    nan, inf = float("nan"), float("inf")
    assert not Check("law", "what", nan, 1e9).ok and not Check("law", "what", inf, 1e9).ok
    assert apart(nan, 1.0) == apart(1.0, nan) == inf and apart(nan, nan) == inf
    one, bad = {"w": torch.ones(3)}, {"w": torch.tensor([1.0, nan, 1.0])}
    assert gradients_apart(bad, one) == inf and gradients_apart(one, one) == 0
    assert bits_apart([torch.tensor([0.0, 1.0])], [torch.tensor([0.0, 1.0 + 2**-23])]) == 1
