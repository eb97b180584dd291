"""Writes the sample data: a small made-up world, told once as text and once as conversations with checkable answers.

Why: a newcomer needs data that trains in minutes, that nobody else owns, and whose answers a program can judge.  The
world is a few dozen words in English and Chinese with their opposites, colours, kinds, capitals and weekdays.  A
question is a frame around a fact ("Tell me {}." around "the opposite of hot"); one pair in eight, picked by a hash, is
held out: it stands in no training conversation and in no line of pretraining text, though its fact does in other
frames and its frame around other facts.

    python examples/make_sample_data.py                 # rewrites the three files beside this program
    python examples/make_sample_data.py --check         # exit code 1 when they differ from what it would write

The output depends on the seed and nothing else: only random.random() is drawn on, which Python promises to keep.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent

# English and Chinese by turns, one kind a line.
LEXICON = {
    ("animal", "动物"): "cat 猫 dog 狗 bird 鸟 fish 鱼 horse 马 cow 牛",
    ("fruit", "水果"): "apple 苹果 pear 梨 lemon 柠檬 cherry 樱桃",
    ("colour", "颜色"): "red 红色 yellow 黄色 green 绿色 blue 蓝色 white 白色 black 黑色",
    ("drink", "饮料"): "water 水 tea 茶 milk 牛奶 coffee 咖啡",
    ("vehicle", "交通工具"): "car 汽车 train 火车 ship 船",
}
MORE_WORDS = "snow 雪 grass 草 sky 天空 blood 血 coal 煤 sun 太阳"
OPPOSITES = """hot cold 热 冷|big small 大 小|long short 长 短|new old 新 旧|fast slow 快 慢|high low 高 低|early late 早 晚
near far 近 远|hard soft 硬 软|good bad 好 坏|open closed 开 关|thick thin 厚 薄"""
COLOURS = {"cherry": "red", "lemon": "yellow", "milk": "white", "snow": "white", "grass": "green", "sky": "blue",
           "blood": "red", "coal": "black", "sun": "yellow"}
CAPITALS = """France Paris 法国 巴黎|China Beijing 中国 北京|Japan Tokyo 日本 东京|Italy Rome 意大利 罗马
Russia Moscow 俄罗斯 莫斯科|Germany Berlin 德国 柏林|Egypt Cairo 埃及 开罗|Greece Athens 希腊 雅典|Cuba Havana 古巴 哈瓦那"""
DAYS = ("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(), [f"星期{d}" for d in "一二三四五六日"])
NAMES = ("Tom Jack Mary Paul Sam Anna Ben Lucy".split(), "小明 小红 小华 小丽 小刚 小美".split())
ROBOTS = "Max Leo Rose Nova".split()

# What is asked for, and what it is wrapped in; every frame goes with every relation.
RELATIONS = {
    "opposite": ("the opposite of {}", "{}的反义词"),
    "to Chinese": ("the Chinese for {}", "{}的中文"),
    "to English": ("the English for {}", "{}的英文"),
    "colour": ("the colour of {}", "{}的颜色"),
    "kind": ("the kind of {}", "{}的种类"),
    "capital": ("the capital of {}", "{}的首都"),
    "day after": ("the day after {}", "{}的后一天"),
    "day before": ("the day before {}", "{}的前一天"),
}
FRAMES = (
    ["What is {}?", "Tell me {}.", "Name {}.", "Give me {}.", "Do you know {}?", "I need {}.", "Please say {}.",
     "Can you write {}?", "I want to know {}.", "Question: {}."],
    ["{}是什么？", "请告诉我{}。", "请说出{}。", "给我{}。", "你知道{}吗？", "我需要{}。", "写出{}。", "请问{}？", "我想知道{}。", "问题：{}。"],
)
FOLLOW_UPS = (["And of {}?", "What about {}?"], ["那么{}呢？", "{}呢？"])
SYSTEMS = (["You are a helpful assistant.", "You are a friendly teacher."], ["你是一个有用的助手。", "你是一位友好的老师。"])
ANSWER_IN = (["Answer in English.", "请用英语回答。"], ["Answer in Chinese.", "请用中文回答。"])
# One held-out pair in so many.
HELD_OUT_OF = 8


class Fact(NamedTuple):
    """The same fact in English and in Chinese: what is asked about, and the answer."""

    skill: str
    about: tuple[str, str]
    answer: tuple[str, str]


class Question(NamedTuple):
    """A fact in a frame, in one language (0 English, 1 Chinese)."""

    fact: Fact
    language: int
    text: str

    @property
    def answer(self) -> str:
        return self.fact.answer[self.language]


@functools.cache
def held_out(*key: str) -> bool:
    """Whether the pair with this name is kept from training, by a hash that never changes."""
    return hashlib.sha256("\n".join(key).encode()).digest()[0] % HELD_OUT_OF == 0


def one(rng: random.Random, choices: Any) -> Any:
    return choices[int(rng.random() * len(choices))]


def shuffled(rng: random.Random, values: list) -> list:
    return [value for _, value in sorted(((rng.random(), i), value) for i, value in enumerate(values))]


def paired(table: str) -> list[tuple[str, ...]]:
    return [tuple(entry.split()) for entry in table.replace("\n", "|").split("|")]


def by_twos(words: str) -> list[tuple[str, str]]:
    parts = words.split()
    return list(zip(parts[::2], parts[1::2]))


def lexicon() -> dict[str, str]:
    """English word -> Chinese word."""
    return dict(pair for words in (*LEXICON.values(), MORE_WORDS) for pair in by_twos(words))


def all_facts() -> list[Fact]:
    """Every fact of the world."""
    words = lexicon()
    facts = []
    for a, b, zh_a, zh_b in paired(OPPOSITES):
        facts += [Fact("opposite", (a, zh_a), (b, zh_b)), Fact("opposite", (b, zh_b), (a, zh_a))]
    for en, zh in words.items():
        facts += [Fact("to Chinese", (en, en), (zh, zh)), Fact("to English", (zh, zh), (en, en))]
    facts += [Fact("colour", (thing, words[thing]), (hue, words[hue])) for thing, hue in COLOURS.items()]
    facts += [Fact("kind", pair, kind) for kind, line in LEXICON.items() for pair in by_twos(line)]
    facts += [Fact("capital", (land, zh_land), (city, zh_city)) for land, city, zh_land, zh_city in paired(CAPITALS)]
    for skill, step in (("day after", 1), ("day before", -1)):
        facts += [Fact(skill, (DAYS[0][i], DAYS[1][i]), (DAYS[0][(i + step) % 7], DAYS[1][(i + step) % 7]))
                  for i in range(7)]
    return facts


def phrase(fact: Fact, language: int) -> str:
    """'the opposite of hot'."""
    return RELATIONS[fact.skill][language].format(fact.about[language])


def ask(fact: Fact, language: int, frame: str) -> Question:
    return Question(fact, language, frame.format(phrase(fact, language)))


def all_questions() -> list[Question]:
    """Every fact in every frame of both languages."""
    return [ask(fact, language, frame) for fact in all_facts() for language in (0, 1) for frame in FRAMES[language]]


def side(questions: list[Question], held: bool) -> list[Question]:
    """The questions of one side of the split."""
    return [question for question in questions if held_out(question.text) == held]


def of_any_skill(rng: random.Random, questions: list[Question]) -> Question:
    """One of them, of each skill as often: there are four times as many translations as days of the week."""
    skill = one(rng, list(RELATIONS))
    return one(rng, [question for question in questions if question.fact.skill == skill])


def conversation(*turns: str, system: str = "") -> dict:
    """User and assistant by turns, the user first, after an optional system prompt."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"conversations": messages}


def follow_up(rng: random.Random, pool: list[Question], held: bool) -> dict:
    """A question, then the same about something else in two words: the first turn has to be remembered."""
    while True:
        opening = one(rng, [q for q in pool if q.fact.skill in ("opposite", "colour", "kind", "capital")])
        skill, language = opening.fact.skill, opening.language
        again = one(rng, [fact for fact in all_facts() if fact.skill == skill and fact != opening.fact])
        short = one(rng, FOLLOW_UPS[language]).format(again.about[language])
        if held_out(skill, short) == held:
            return conversation(opening.text, opening.answer, short, again.answer[language])


def told_name(rng: random.Random, pool: list[Question], held: bool) -> dict:
    """The user gives a name and asks for it later."""
    while True:
        language = int(rng.random() * 2)
        name = one(rng, NAMES[language])
        tell = one(rng, (["My name is {}.", "I am {}.", "Hello, I am {}.", "Call me {}."],
                         ["我叫{}。", "我是{}。", "你好，我是{}。", "请叫我{}。"])[language]).format(name)
        question = one(rng, (["What is my name?", "Who am I?", "Tell me my name.", "Do you know my name?"],
                             ["我叫什么？", "我是谁？", "请说出我的名字。", "你知道我的名字吗？"])[language])
        if held_out(tell, question) == held:
            return conversation(tell, (f"Hello, {name}.", f"你好，{name}。")[language], question, name)


def own_name(rng: random.Random, pool: list[Question], held: bool) -> dict:
    """The system prompt names the assistant; the user asks who it is."""
    while True:
        language, robot = int(rng.random() * 2), one(rng, ROBOTS)
        system = one(rng, (["You are {}.", "Your name is {}.", "You are called {}."],
                           ["你是 {}。", "你叫 {}。", "你的名字是 {}。"])[language]).format(robot)
        question = one(rng, (["What is your name?", "Who are you?", "Tell me your name.", "Do you have a name?"],
                             ["你叫什么？", "你是谁？", "请说出你的名字。", "你有名字吗？"])[language])
        if held_out(system, question) == held:
            return conversation(question, robot, system=system)


def ruled_language(rng: random.Random, pool: list[Question], held: bool) -> dict:
    """The system prompt rules the language of the answer, whatever that of the question."""
    question, rule = of_any_skill(rng, side(pool, held)), int(rng.random() * 2)
    return conversation(question.text, question.fact.answer[rule], system=one(rng, ANSWER_IN[rule]))


def several(rng: random.Random, pool: list[Question], held: bool) -> dict:
    """Two or three unrelated questions, some under a system prompt that changes nothing; the last one counts."""
    earlier = [of_any_skill(rng, side(pool, False)) for _ in range(1 + int(rng.random() * 2))]
    last = of_any_skill(rng, side(pool, held))
    turns = [turn for question in (*earlier, last) for turn in (question.text, question.answer)]
    return conversation(*turns, system=one(rng, SYSTEMS[last.language]) if rng.random() < 0.5 else "")


MAKERS = {"follow-up": follow_up, "told a name": told_name, "own name": own_name, "ruled language": ruled_language,
          "several": several}
WANTED = {"several": 500, "ruled language": 500, "follow-up": 300, "told a name": 180}


def conversations(rng: random.Random, held: bool) -> list[dict]:
    """One side of the split: single questions, then each kind of conversation; no prompt twice."""
    pool = all_questions()
    singles = side(pool, held)
    if not held:
        # Of the translations, which are the most and the easiest, every other one.
        singles = [q for i, q in enumerate(singles) if i % 2 or not q.fact.skill.startswith("to ")]
    singles = shuffled(rng, singles)[:160 if held else None]
    named = [(question.fact.skill, conversation(question.text, question.answer)) for question in singles]
    trained = side(pool, False)
    for name, make in MAKERS.items():
        wanted = 20 if held else WANTED.get(name, 100)
        found: dict[str, dict] = {}
        for _ in range(30 * wanted):
            record = make(rng, pool if make in (ruled_language, several) else trained, held)
            found.setdefault(json.dumps(record["conversations"][:-1]), record)
            if len(found) == wanted:
                break
        named += [(name, record) for record in found.values()]
    return [{**record, **({"skill": skill} if held else {})} for skill, record in shuffled(rng, named)]


def story(rng: random.Random, language: int) -> str:
    """Some made-up sentences about one person."""
    kinds = {kind: [pair[language] for pair in by_twos(line)] for (kind, _), line in LEXICON.items()}
    name, friend = shuffled(rng, NAMES[language])[:2]
    animal, fruit, drink, hue = (one(rng, kinds[kind]) for kind in ("animal", "fruit", "drink", "colour"))
    n, day = 2 + int(rng.random() * 4), one(rng, DAYS[language])
    if language:
        return f"{name}有 {n} 个{fruit}和一只{animal}。{day}，{friend}来看{name}。{friend}喝{drink}，画一只{hue}的{animal}。"
    return (f"{name} has a {animal} and {n} of {fruit}. On {day} {friend} comes to see {name}. {friend} drinks {drink} "
            f"and paints a {hue} {animal}.")


def statements() -> list[str]:
    """Every fact as a sentence, in both languages; none of them is a question in a frame."""
    english = [f"T{phrase(fact, 0)[1:]} is {fact.answer[0]}." for fact in all_facts()]
    return english + [f"{phrase(fact, 1)}是{fact.answer[1]}。" for fact in all_facts()]


def pretraining(rng: random.Random) -> list[dict]:
    """The facts, four to a line, several times over, and stories."""
    lines = []
    for _ in range(6):
        mixed = shuffled(rng, statements())
        lines += [" ".join(mixed[i:i + 4]) for i in range(0, len(mixed), 4)]
    lines += [story(rng, i % 2) for i in range(200)]
    return [{"text": line} for line in shuffled(rng, lines)]


def sample_files(seed: int) -> dict[str, str]:
    """File name -> its text, for one seed."""
    made = {"pretrain.jsonl": pretraining(random.Random(f"{seed} pretrain")),
            "sft_train.jsonl": conversations(random.Random(f"{seed} train"), False),
            "sft_heldout.jsonl": conversations(random.Random(f"{seed} held out"), True)}
    return {name: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            for name, records in made.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the bilingual sample data.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this program's)")
    parser.add_argument("--seed", type=int, default=42, help="another seed, another sample (default: 42)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a file differs")
    args = parser.parse_args()
    stale = []
    for name, text in sample_files(args.seed).items():
        path = args.out / name
        if args.check:
            stale += [name] if not path.exists() or path.read_bytes() != text.encode() else []
            continue
        path.write_bytes(text.encode())
        print(f"{name}: {text.count(chr(10))} lines, {len(text.encode()) / 1024:.0f} KiB")
    for name in stale:
        print(f"{name} is not what this program writes", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
