"""docs/DATA.md says what is so: every key stands in it, and each example learns the words in bold.

    python -m pytest tests/data/test_docs.py
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest

from minimind_ds.config.run import RunConfig
from minimind_ds.data import shapes, turns
from minimind_ds.data.conversation import parse_conversation
from minimind_ds.data.sample import MARKERS, POLICIES, build_text_sample, render
from minimind_ds.data.tokenizer import load_tokenizer
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"\| `(\{.*\})` \| (.*) \|$", PAGE, re.MULTILINE)


def bold(record: dict) -> str:
    """What the page shows of a record, found by rendering it."""
    if "text" in record:
        tok = load_tokenizer()
        assert tok.decode(build_text_sample(record["text"], tok, 99).labels[:-2]) == record["text"]
        return f"**{record['text']}**"
    said = ""
    for learnt, pieces in itertools.groupby(render(parse_conversation(record), drop_empty_think=True),
                                            key=lambda piece: piece.labelled):
        text = "".join(f"`{piece.text}`" if piece.text in MARKERS else piece.text for piece in pieces)
        text = " ".join(re.sub(r"<\|im_start\|>(\w+)\n", r"\1: ", text).replace("<|im_end|>", "").split())
        said += f" **{text}**" if learnt else f" {text}"
    return " ".join(said.split())


def test_the_page_has_its_examples():
    kinds = {shapes.record_shape(json.loads(record)) for record, _ in EXAMPLES}
    assert kinds == set(shapes.KNOWN) and len(EXAMPLES) >= 12


@pytest.mark.parametrize("record, shown", EXAMPLES)
def test_an_example_learns_the_words_in_bold(record, shown):
    assert bold(json.loads(record)) == shown


def test_every_key_and_speaker_stands_on_the_page():
    keys = set().union(*shapes.KNOWN.values(), turns.TURN_KEYS, turns.ROLES, turns.TEXT_PARTS)
    assert not {key for key in keys if not re.search(rf"[`\"]{key}[`\"]", PAGE)}


def test_every_flag_on_the_page_is_one_and_the_policies_begin_with_their_default():
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    assert set(re.findall(r"`?--([a-z_]+)", PAGE)) <= defaults.keys()
    first = dict(re.findall(r"^\| `--(\w+)` \| `(\w+)`", PAGE, re.MULTILINE))
    assert first == {name: defaults[name] for name in ("learn", "text_markers", "on_bad_record")}
    told = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", PAGE.split("<!-- long text: begin -->")[1], re.MULTILINE)
    assert [policy for policy, *_ in told] == list(POLICIES["text"])
    for number, kind in enumerate(("text", "conversations"), 1):
        assert [row[0] for row in told if "the default" in row[number]] == [POLICIES[kind][0]]
