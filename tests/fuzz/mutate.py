"""Hostile values, texts and bytes, and structures with a few places altered; everything from one random.Random."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

# Stands for a number of more digits than Python converts, until `json_text` writes it.
DIGITS = "@digits@"
TEXTS = ["", " ", "a", "auto", "none", "true", "1", "-1", "1e999", "nan", "0x10", "\0", "\n", "\r\n", "\x1b[31mred",
         "\ud800",
         "\ufeff", "\u2028", "\u202e", "e\u0301", "你好", "x" * 3000, "..", "../../x", "/", "/etc/passwd", "/dev/zero",
         "~", "*", "[",
         "$(touch owned)", "`touch owned`", "'; touch owned; '", "-oProxyCommand=touch owned", "%s%n%d", "{}", "[]",
         "null", "<|im_end|>",
         "<|im_start|>assistant\n", "<think>", "</think>\n\n", "<tool_call>", "\u2581", "cpu", "nvme", "Adam",
         "q_proj", "x,y,,z", "a b",
         "\\", '"', "'"]
NUMBERS = [0, 1, -1, 2, 3, 64, 127, 65535, 2**31, 2**32, 2**63, -2**63, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5,
           1e-320, 1e308, -1e308,
           math.nan, math.inf, -math.inf]
OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": 1}}, [1, 2, 3], ["a", "b"], DIGITS]
SCRAPS = [b"\0", b"\n", b"\r", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", b"\x80", b"{", b"}", b"[",
          b"]", b'"', b"\\", b"\\u0000",
          b"\\ud800", b",", b":", b"-", b"1e999", b"NaN", b"null", b"[" * 300, b'{"a":' * 300, b"9" * 5000, b"//",
          b"/*", b"#", b"&a", b"*a", b"!!",
          b"<<: ", b"? ", b"- ", b"'", b"%", b"\t", b"\x1b["]


def value(draw: random.Random) -> Any:
    """Anything that JSON can hold, and some that it cannot."""
    return copy.deepcopy(draw.choice(draw.choice((TEXTS, NUMBERS, OTHERS))))


def text(draw: random.Random) -> str:
    """Several hostile pieces one after the other."""
    parts = draw.choices(TEXTS, k=draw.choice((1, 1, 2, 3, 5)))
    if draw.random() < 0.2:
        parts.append("".join(chr(draw.choice((draw.randrange(128), draw.randrange(0x3000),
                                              draw.randrange(0xe000, 0x110000))))
                             for _ in range(draw.randrange(1, 6))))
    return "".join(parts)


def places(tree: Any, at: tuple = ()) -> list[tuple]:
    """The path of each node below the root, of at most 50 of a list's."""
    keys = list(tree) if isinstance(tree, dict) else range(min(len(tree), 50)) if isinstance(tree, list) else ()
    return [place for key in keys for place in [(*at, key), *places(tree[key], (*at, key))]]


def node(tree: Any, place: tuple) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def altered(draw: random.Random, tree: Any, keys: tuple[str, ...] = (), times: int | None = None) -> Any:
    """A copy with one to five places changed: another value, type, key or number of them.

    keys: names that mean something where the tree belongs.
    """
    tree = copy.deepcopy(tree)
    for _ in range(times or draw.choice((1, 1, 1, 2, 3, 5))):
        there = places(tree)
        if not there or draw.random() < 0.02:
            return value(draw)
        place = draw.choice(there)
        parent, key = node(tree, place[:-1]), place[-1]
        kind, old = draw.randrange(8), node(tree, place)
        if kind <= 2:
            parent[key] = value(draw)
        elif kind == 3:
            del parent[key]
        elif kind == 4:
            parent[key] = draw.choice(([old], {"a": old}, str(old)[:4000],
                                       copy.deepcopy(node(tree, draw.choice(there)))))
        elif kind == 5 and isinstance(parent, dict):
            parent[draw.choice(keys) if keys and draw.random() < 0.8
                   else text(draw)] = draw.choice((parent.pop(key), value(draw)))
        elif kind == 5:
            parent[key:key] = [copy.deepcopy(old)] * draw.choice((1, 2, 40))
        elif kind == 6 and isinstance(old, str):
            cut = draw.randrange(len(old) + 1)
            parent[key] = old[:cut] + text(draw) + old[cut:]
        elif kind == 6 and isinstance(old, (int, float)):
            parent[key] = draw.choice((-old, old + 1, old * 1_000_003, bool(old), f"{old!r:.400}", old / 7
                                       if abs(old) < 1e300 else 0))
        elif isinstance(old, dict):
            old[draw.choice(keys) if keys else text(draw)] = value(draw)
        else:
            parent[key] = value(draw)
    return tree


def chewed(draw: random.Random, content: bytes, times: int | None = None) -> bytes:
    """The bytes with a few places changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(times or draw.choice((1, 1, 2, 4))):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(7)
        if kind == 0 or not data:
            data[at:at] = draw.choice(SCRAPS)
        elif kind == 1:
            data[at:at + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            del data[at:at + draw.choice((1, 1, 4, 64, 1024))]
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at + 1] = draw.choice(SCRAPS)
        elif kind == 5:
            data[at:at] = data[at:at + draw.choice((1, 8, 200))] * draw.choice((1, 3))
        elif at < len(data):
            data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


def json_text(draw: random.Random, tree: Any, **options) -> str:
    """JSON as json.dumps writes it, NaN included, and as it never does: a key twice, thousands of digits or levels."""
    said = json.dumps(tree, ensure_ascii=draw.random() < 0.5, default=str, **options)
    said = said.replace(f'"{DIGITS}"', "9" * draw.choice((4000, 5000)))
    if draw.random() < 0.03 and "{" in said:
        deep = '{"": ' + "[" * draw.choice((40, 1200))
        said = said.replace("{", draw.choice(('{"a": 1, "a": 2, ', deep)), 1)
    return said


def plain_bytes(draw: random.Random, tree: Any) -> bytes:
    """JSON without anything odd but in its values."""
    return json.dumps(tree, default=str, indent=draw.choice((None, 2))).encode("utf-8", "surrogatepass")


def json_bytes(draw: random.Random, tree: Any, **options) -> bytes:
    """json_text as a file may hold it, one in three with bytes changed."""
    content = json_text(draw, tree, **options).encode("utf-8", "surrogatepass")
    return chewed(draw, content) if draw.random() < 0.3 else content
