"""Whatever stands in a file that others wrote, the answer is plain values or one line."""

import os

import pytest

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize("text, said", [
    ('{"a": 1, "a": 2}', "key 'a' appears twice"),
    ('{"a": NaN}', "'NaN' is not a finite number"),
    ('{"a": 1e999}', "'1e999' is not a finite number"),
    ('{"a": ' + "[" * 100_000, "nested too deeply"),
    ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"a": [' + "0," * 200_000 + "0]}", "more than 100000 values"),
    ("[1]", "it holds a list, not a JSON object"),
    ('"' + "x" * 1000 + '"', "..., not a JSON object"),
    ('{\n"a": 1,\n"b"}', "it line 3: not valid JSON"),
    ("", "line 1: not valid JSON"),
])
def test_json_that_is_not_plain_is_one_line(text, said):
    with pytest.raises(UserError) as caught:
        untrusted.json_object(text, "it")
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("text, said", [
    (BOMB, "more than 100000 values"),
    ("a: &a [*a]\n", "nested too deeply"),
    ("a: 1\na: 2\n", "it line 2: not valid YAML: key 'a' appears twice"),
    ('a: "b\\0c"\n', r"it: 'b\x00c' holds a NUL byte"),
    ("a: !!python/object/apply:os.system [ls]\n", "it line 1: not valid YAML"),
    ("a: " + "[" * 5000, "nested too deeply"),
    ("a: 2020-13-45\n", "not valid YAML"),
    ("? {a: b}\n: 1\n", "not valid YAML"),
    ("a: [1\n", "it line 2: not valid YAML"),
    ("", "it holds nothing"),
    ("- 1\n", "it holds a list"),
    ("a: \x00", "not valid YAML"),
])
def test_yaml_that_is_not_plain_is_one_line(text, said):
    with pytest.raises(UserError) as caught:
        untrusted.yaml_mapping(text, "it")
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_anchors_and_merges_are_plain_yaml():
    text = "base: &base {a: 1, b: 2}\nrun: {<<: *base, b: 3}\n"
    assert untrusted.yaml_mapping(text, "it")["run"] == {"a": 1, "b": 3}


def test_only_regular_files_are_read_and_only_so_much(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 2000)
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "marked").write_bytes("\ufeffa: 1".encode())
    for path, said in [(tmp_path / "pipe", "is a pipe, not a regular file"), ("/dev/zero", "is a device"),
                       (tmp_path, "is a folder"), (tmp_path / "none", "No such file"), ("x" * 5000, "too long"),
                       ("a\0b", "is no file name"), (tmp_path / "large", "the most that is read of it")]:
        with pytest.raises(UserError, match=said) as caught:
            untrusted.read_bytes(path, 1000)
        assert len(str(caught.value)) < 500
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 1\)"):
        untrusted.read_text(tmp_path / "latin")
    assert untrusted.read_text(tmp_path / "marked") == "a: 1"


@pytest.mark.parametrize("field, value", [
    ("hidden_size", 0), ("hidden_size", "768"), ("hidden_size", 768.0), ("hidden_size", True), ("hidden_size", 10**9),
    ("num_hidden_layers", 10**9), ("vocab_size", -1), ("head_dim", 0), ("num_experts", None), ("rms_norm_eps", "x"),
    ("rope_theta", float("nan")), ("rope_theta", float("inf")), ("use_moe", 1), ("tie_word_embeddings", "no"),
    ("hidden_act", ["silu"]), ("rope_scaling", [1]), ("dropout", -0.1), ("eos_token_id", [2])])
def test_a_model_s_field_has_its_type_and_its_range(field, value):
    with pytest.raises(UserError, match=f"^{field} is "):
        ModelConfig.from_dict({field: value})
