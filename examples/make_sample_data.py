"""Writes the sample data: a small made-up world, told once as text and once as conversations with checkable answers.

Why: a newcomer needs data that trains in minutes, that nobody else owns, and whose answers a program can judge.  The
world is 60 words in English and Chinese, their opposites, colours, capitals, days, months and small numbers.  A
question is a (phrasing, item) pair; one question in eight, picked by a hash of its text, is held out: it stands in
no training conversation and in no line of pretraining text, though its facts do, in other phrasings.

    python examples/make_sample_data.py                 # rewrites the three files beside this program
    python examples/make_sample_data.py --check         # exit code 1 when they differ from what it would write

The output depends on the seed and nothing else: only random.random() is drawn on, which Python promises to keep.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent

# English and Chinese by turns, one kind a line.
LEXICON = {
    ("animal", "动物"): "cat 猫 dog 狗 bird 鸟 fish 鱼 horse 马 cow 牛 sheep 羊 rabbit 兔子 tiger 老虎 monkey 猴子",
    ("fruit", "水果"): "apple 苹果 banana 香蕉 pear 梨 grape 葡萄 peach 桃子 lemon 柠檬 cherry 樱桃 mango 芒果",
    ("colour", "颜色"): "red 红色 yellow 黄色 green 绿色 blue 蓝色 white 白色 black 黑色 brown 棕色 purple 紫色",
    ("drink", "饮料"): "water 水 tea 茶 milk 牛奶 coffee 咖啡 juice 果汁",
    ("body part", "身体部位"): "hand 手 foot 脚 eye 眼睛 ear 耳朵 nose 鼻子 mouth 嘴 head 头",
    ("piece of furniture", "家具"): "table 桌子 chair 椅子 bed 床 lamp 灯 sofa 沙发 desk 书桌",
    ("vehicle", "交通工具"): "car 汽车 bus 公交车 train 火车 ship 船 plane 飞机 bicycle 自行车",
    ("piece of clothing", "衣服"): "shirt 衬衫 hat 帽子 shoe 鞋 coat 外套 sock 袜子 scarf 围巾",
}
OPPOSITES = """hot cold 热 冷|big small 大 小|long short 长 短|new old 新 旧|fast slow 快 慢|high low 高 低|open closed 开 关
happy sad 高兴 难过|full empty 满 空|rich poor 富 穷|strong weak 强 弱|early late 早 晚|near far 近 远|hard soft 硬 软
wet dry 湿 干|clean dirty 干净 脏|true false 真 假|left right 左 右|up down 上 下|day night 白天 黑夜|good bad 好 坏
thick thin 厚 薄|loud quiet 吵闹 安静|begin end 开始 结束|buy sell 买 卖|win lose 赢 输|easy difficult 容易 困难
deep shallow 深 浅|wide narrow 宽 窄|push pull 推 拉"""
COLOURS = {"banana": "yellow", "cherry": "red", "lemon": "yellow", "tiger": "yellow", "milk": "white", "coffee": "brown",
           "snow": "white", "grass": "green", "sky": "blue", "sea": "blue", "coal": "black", "blood": "red",
           "grape": "purple", "sugar": "white", "chocolate": "brown", "leaf": "green"}
MORE_WORDS = "snow 雪 grass 草 sky 天空 sea 大海 coal 煤 blood 血 sugar 糖 chocolate 巧克力 leaf 树叶"
CAPITALS = """France Paris 法国 巴黎|China Beijing 中国 北京|Japan Tokyo 日本 东京|Italy Rome 意大利 罗马|Spain Madrid 西班牙 马德里
Germany Berlin 德国 柏林|Russia Moscow 俄罗斯 莫斯科|Egypt Cairo 埃及 开罗|Greece Athens 希腊 雅典|Korea Seoul 韩国 首尔
Austria Vienna 奥地利 维也纳|Poland Warsaw 波兰 华沙|Norway Oslo 挪威 奥斯陆|Cuba Havana 古巴 哈瓦那
Peru Lima 秘鲁 利马|Kenya Nairobi 肯尼亚 内罗毕|Thailand Bangkok 泰国 曼谷|Portugal Lisbon 葡萄牙 里斯本"""
DAYS = ("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(), [f"星期{d}" for d in "一二三四五六日"])
MONTHS = ("January February March April May June July August September October November December".split(),
          [f"{m}月" for m in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()])
NAMES = ("Tom Anna Ben Lucy Jack Mary Paul Rose Sam Nina Leo Emma".split(),
         "小明 小红 小华 小丽 小刚 小芳 小强 小美".split())
ROBOTS = "Nova Pixel Orion Luna Atlas Echo Zephyr Comet".split()

# What is asked, in each language.  A skill's phrasings never share a text with another skill's.
PHRASINGS = {
    "opposite": (
        ["What is the opposite of {x}?", "Give me the opposite of {x}.", "Which word means the opposite of {x}?",
         "Opposite of {x}?", "Tell me the word opposite to {x}."],
        ["“{x}”的反义词是什么？", "请说出“{x}”的反义词。", "和“{x}”意思相反的词是什么？", "哪个词和“{x}”意思相反？", "“{x}”的反义词？"]),
    "to Chinese": (
        ["How do you say {x} in Chinese?", "Translate {x} into Chinese.", "What is the Chinese word for {x}?",
         "The Chinese for {x}, please."],
        ["{x} 用中文怎么说？", "把 {x} 翻译成中文。", "英语单词 {x} 是什么意思？", "{x} 的中文是什么？"]),
    "to English": (
        ["How do you say “{x}” in English?", "Translate “{x}” into English.", "What is the English word for “{x}”?",
         "The English for “{x}”, please."],
        ["“{x}”用英语怎么说？", "把“{x}”翻译成英语。", "“{x}”的英语单词是什么？", "“{x}”的英文是什么？"]),
    "colour": (
        ["What colour is {x}?", "Tell me the colour of {x}.", "Which colour does {x} have?", "The colour of {x}?"],
        ["“{x}”是什么颜色的？", "请说出“{x}”的颜色。", "“{x}”的颜色是什么？", "“{x}”有什么颜色？"]),
    "kind": (
        ["What kind of thing is {x}?", "Tell me what {x} is.", "Which group does {x} belong to?", "{x}: what is it?"],
        ["“{x}”是什么东西？", "“{x}”属于哪一类？", "请说出“{x}”的类别。", "“{x}”是哪种东西？"]),
    "capital": (
        ["What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?",
         "Capital of {x}?", "Tell me the capital city of {x}."],
        ["{x}的首都是哪里？", "请说出{x}的首都。", "{x}的首都叫什么？", "哪个城市是{x}的首都？", "{x}的首都？"]),
    "day after": (
        ["Which day comes after {x}?", "What day follows {x}?", "If today is {x}, what day is tomorrow?",
         "The day after {x}?"],
        ["{x}的后一天是星期几？", "今天是{x}，明天是星期几？", "{x}过后是星期几？", "{x}之后的一天是星期几？"]),
    "day before": (
        ["Which day comes before {x}?", "What day is just before {x}?", "If today is {x}, what day was yesterday?",
         "The day before {x}?"],
        ["{x}的前一天是星期几？", "今天是{x}，昨天是星期几？", "{x}前面是星期几？", "{x}之前的一天是星期几？"]),
    "month after": (
        ["Which month comes after {x}?", "What month follows {x}?", "Name the month after {x}.", "The month after {x}?"],
        ["{x}的下一个月是几月？", "{x}过后是几月？", "现在是{x}，下个月是几月？", "{x}之后是几月？"]),
    "number after": (
        ["What number comes after {x}?", "Count on from {x}.", "The number after {x}?", "What is one more than {x}?"],
        ["{x} 的下一个数是什么？", "比 {x} 大一的数是多少？", "{x} 后面的数是几？", "数到 {x}，下一个是多少？"]),
    "sum": (
        ["What is {x} plus {y}?", "Add {x} and {y}.", "How much is {x} + {y}?", "{x} + {y} = ?",
         "I have {x} apples and get {y} more. How many apples do I have?"],
        ["{x} 加 {y} 等于几？", "{x} 加上 {y} 是多少？", "请计算 {x} + {y}。", "{x} + {y} 是几？", "我有 {x} 个苹果，又得到 {y} 个，一共有几个？"]),
    "difference": (
        ["What is {x} minus {y}?", "Take {y} away from {x}.", "How much is {x} - {y}?", "{x} - {y} = ?",
         "I have {x} apples and eat {y}. How many are left?"],
        ["{x} 减 {y} 等于几？", "{x} 减去 {y} 是多少？", "请计算 {x} - {y}。", "{x} - {y} 是几？", "我有 {x} 个苹果，吃了 {y} 个，还剩几个？"]),
    "larger": (
        ["Which is larger, {x} or {y}?", "Name the larger number: {x} or {y}.", "{x} or {y}: which is more?"],
        ["{x} 和 {y} 哪个大？", "请说出 {x} 和 {y} 中较大的数。", "{x} 与 {y}，哪个更大？"]),
    "parity": (
        ["Is {x} odd or even?", "{x}: odd or even?", "Tell me if {x} is odd or even."],
        ["{x} 是奇数还是偶数？", "{x}：奇数还是偶数？", "请判断 {x} 是奇数还是偶数。"]),
    "first word": (
        ["What is the first word of this list: {x}", "Give me the first word: {x}", "Which word comes first? {x}"],
        ["这些词中第一个是什么：{x}", "请说出第一个词：{x}", "哪个词排在最前面？{x}"]),
    "last word": (
        ["What is the last word of this list: {x}", "Give me the last word: {x}", "Which word comes last? {x}"],
        ["这些词中最后一个是什么：{x}", "请说出最后一个词：{x}", "哪个词排在最后面？{x}"]),
    "repeat": (
        ["Repeat after me: {x}", "Say these words again: {x}", "Write this once more: {x}"],
        ["请跟我说：{x}", "请重复这些词：{x}", "把这些词再写一遍：{x}"]),
    "reverse": (
        ["Say these words backwards: {x}", "Reverse the order: {x}", "Write these words from last to first: {x}"],
        ["请倒过来说：{x}", "把顺序反过来：{x}", "从后往前写这些词：{x}"]),
    "count": (
        ["How many words are in this list: {x}", "Count these words: {x}", "Tell me the number of words: {x}"],
        ["这里有几个词：{x}", "数一数这些词：{x}", "请说出词的个数：{x}"]),
}
FOLLOW_UPS = (["And {x}?", "What about {x}?", "And for {x}?"], ["那“{x}”呢？", "“{x}”呢？", "“{x}”又如何？"])
DRAWN = ("larger", "parity", "first word", "last word", "repeat", "reverse", "count")
SYSTEMS = (["You are a helpful assistant.", "Answer in one word if you can.", "You are a friendly teacher."],
           ["你是一个有用的助手。", "请尽量简短地回答。", "你是一位友好的老师。"])
ANSWER_IN = (["Always answer in English.", "请始终用英语回答。"], ["Always answer in Chinese.", "请始终用中文回答。"])


class Question(NamedTuple):
    """One thing to ask: `item` names the fact, whatever the phrasing."""

    skill: str
    language: int  # 0 English, 1 Chinese
    item: str
    text: str
    answer: str


def held_out(*key: str) -> bool:
    """Whether the question with this text is kept from training: one in eight, by a hash that never changes."""
    return hashlib.sha256("\n".join(key).encode()).digest()[0] % 8 == 0


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
    pairs = [pair for words in (*LEXICON.values(), MORE_WORDS) for pair in by_twos(words)]
    return dict(pairs)


def facts(skill: str) -> list[tuple[tuple[Any, Any, str], tuple[Any, Any, str]]]:
    """Every fact of a skill as (x, y, answer), in English and in Chinese, line by line the same fact."""
    words, numbers = lexicon(), range(10)
    both = [pair for en_a, en_b, zh_a, zh_b in paired(OPPOSITES)
            for pair in (((en_a, "", en_b), (zh_a, "", zh_b)), ((en_b, "", en_a), (zh_b, "", zh_a)))]
    if skill == "opposite":
        return both
    if skill in ("to Chinese", "to English"):
        return [((en, "", zh),) * 2 if skill == "to Chinese" else ((zh, "", en),) * 2 for en, zh in words.items()]
    if skill == "colour":
        return [((thing, "", hue), (words[thing], "", words[hue])) for thing, hue in COLOURS.items()]
    if skill == "kind":
        return [((en, "", kind), (zh, "", sort)) for (kind, sort), line in LEXICON.items() for en, zh in by_twos(line)]
    if skill == "capital":
        return [((land, "", city), (zh_land, "", zh_city)) for land, city, zh_land, zh_city in paired(CAPITALS)]
    if skill in ("day after", "day before", "month after"):
        (en, zh), step = MONTHS if skill == "month after" else DAYS, -1 if skill == "day before" else 1
        after = [(i + step) % len(en) for i in range(len(en))]
        return [((en[i], "", en[j]), (zh[i], "", zh[j])) for i, j in enumerate(after)]
    if skill == "number after":
        return [((n, "", str(n + 1)),) * 2 for n in range(100)]
    if skill == "sum":
        return [((a, b, str(a + b)),) * 2 for a in numbers for b in numbers]
    assert skill == "difference", skill
    return [((a, b, str(a - b)),) * 2 for a in numbers for b in numbers if a >= b]


def drawn_fact(rng: random.Random, skill: str, language: int) -> tuple[Any, Any, str]:
    """One (x, y, answer) of a skill that has too many to list: its answers are worked out, never remembered."""
    if skill == "larger":
        x, y = int(rng.random() * 100), int(rng.random() * 99)
        y += y >= x
        return x, y, str(max(x, y))
    if skill == "parity":
        n = int(rng.random() * 200)
        return n, "", (("even", "odd"), ("偶数", "奇数"))[language][n % 2]
    vocabulary = list(lexicon().values() if language else lexicon())
    length = 2 + int(rng.random() * 5) if skill == "count" else 3
    words = shuffled(rng, vocabulary)[:length]
    answer = {"first word": words[0], "last word": words[-1], "repeat": " ".join(words),
              "reverse": " ".join(words[::-1]), "count": str(length)}[skill]
    return " ".join(words), "", answer


def questions(rng: random.Random, skill: str) -> Iterator[Question]:
    """Every question of a listed skill in random order, or an endless stream of a drawn one's."""
    if skill in DRAWN:
        while True:
            language = int(rng.random() * 2)
            x, y, answer = drawn_fact(rng, skill, language)
            yield Question(skill, language, f"{x}|{y}", one(rng, PHRASINGS[skill][language]).format(x=x, y=y), answer)
    everything = [Question(skill, language, f"{fact[language][0]}|{fact[language][1]}",
                           phrasing.format(x=fact[language][0], y=fact[language][1]), fact[language][2])
                  for fact in facts(skill) for language in (0, 1) for phrasing in PHRASINGS[skill][language]]
    yield from shuffled(rng, everything)


def take(rng: random.Random, skill: str, wanted: int, held: bool) -> list[Question]:
    """Up to `wanted` different questions from one side of the split."""
    found: dict[str, Question] = {}
    for question in questions(rng, skill):
        if held_out(question.text) == held:
            found.setdefault(question.text, question)
        if len(found) == wanted:
            break
    return list(found.values())


def conversation(*turns: str, system: str = "") -> dict:
    """User and assistant by turns, the user first, after an optional system prompt."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"conversations": messages}


def follow_up(rng: random.Random, held: bool) -> dict:
    """A question, then the same about something else in two words: the first turn has to be remembered."""
    while True:
        skill, language = one(rng, ("opposite", "colour", "kind", "capital")), int(rng.random() * 2)
        (x, _, first), (again, _, second) = (fact[language] for fact in shuffled(rng, facts(skill))[:2])
        opening = one(rng, PHRASINGS[skill][language]).format(x=x)
        short = one(rng, FOLLOW_UPS[language]).format(x=again)
        if held_out(skill, short) == held and not held_out(opening):
            return conversation(opening, first, short, second)


def told_name(rng: random.Random, held: bool) -> dict:
    """The user gives a name and asks for it later, sometimes after another question."""
    while True:
        language = int(rng.random() * 2)
        name = one(rng, NAMES[language])
        tell = one(rng, (["My name is {}.", "I am {}.", "Hello, I am called {}."],
                         ["我叫{}。", "我的名字是{}。", "你好，我是{}。"])[language]).format(name)
        ask = one(rng, (["What is my name?", "Who am I?", "Do you know my name?"],
                        ["我叫什么名字？", "我是谁？", "你知道我的名字吗？"])[language])
        hello = (f"Hello, {name}!", f"你好，{name}！")[language]
        between = [turn for question in take_one(rng, language) for turn in (question.text, question.answer)]
        if held_out(tell, ask) == held:
            return conversation(tell, hello, *between, ask, name)


def take_one(rng: random.Random, language: int) -> list[Question]:
    """One training question in this language, or none, evenly."""
    if rng.random() < 0.5:
        return []
    skill = one(rng, ("opposite", "capital", "colour", "sum"))
    return [next(q for q in questions(rng, skill) if q.language == language and not held_out(q.text))]


def own_name(rng: random.Random, held: bool) -> dict:
    """The system prompt names the assistant; the user asks who it is."""
    while True:
        language, robot = int(rng.random() * 2), one(rng, ROBOTS)
        system = one(rng, (["You are {}.", "Your name is {}.", "You are an assistant called {}."],
                           ["你是{}。", "你的名字是{}。", "你是一个叫{}的助手。"])[language]).format(robot)
        ask = one(rng, (["What is your name?", "Who are you?", "What are you called?"],
                        ["你叫什么名字？", "你是谁？", "怎么称呼你？"])[language])
        if held_out(system, ask) == held:
            return conversation(ask, (f"I am {robot}.", f"我是{robot}。")[language], system=system)


def ruled_language(rng: random.Random, held: bool) -> dict:
    """The system prompt rules the language of the answer, whatever that of the question."""
    while True:
        skill, language, rule = one(rng, ("opposite", "colour", "kind", "capital")), int(rng.random() * 2), int(rng.random() * 2)
        fact = one(rng, facts(skill))
        text = one(rng, PHRASINGS[skill][language]).format(x=fact[language][0])
        if held_out(text) == held:
            return conversation(text, fact[rule][2], system=one(rng, ANSWER_IN[rule]))


def several(rng: random.Random, held: bool) -> dict:
    """Two or three unrelated questions, under a system prompt that changes nothing; the last is the one that counts."""
    earlier = [take(rng, one(rng, list(PHRASINGS)), 1, False)[0] for _ in range(1 + int(rng.random() * 2))]
    last = take(rng, one(rng, list(PHRASINGS)), 1, held)[0]
    turns = [turn for question in (*earlier, last) for turn in (question.text, question.answer)]
    system = one(rng, SYSTEMS[last.language]) if rng.random() < 0.5 else ""
    return conversation(*turns, system=system)


def conversations(rng: random.Random, held: bool) -> list[dict]:
    """One side of the split: single questions by skill, then each kind of conversation; no prompt twice."""
    listed, drawn, dialogues = (12, 12, 12) if held else (420, 160, 260)
    records = [conversation(q.text, q.answer) for skill in PHRASINGS
               for q in take(rng, skill, drawn if skill in DRAWN else listed, held)]
    for make in (follow_up, told_name, own_name, ruled_language, several):
        found: dict[str, dict] = {}
        for _ in range(20 * dialogues):
            record = make(rng, held)
            found.setdefault(json.dumps(record["conversations"][:-1]), record)
            if len(found) == dialogues:
                break
        records += found.values()
    return shuffled(rng, records)


def statements() -> list[list[str]]:
    """Every fact told in one to two ways, grouped by language."""
    told: list[list[str]] = [[], []]
    say = {
        "opposite": (["The opposite of {x} is {a}.", "{x} and {a} are opposites."], ["“{x}”的反义词是“{a}”。", "“{x}”和“{a}”意思相反。"]),
        "to Chinese": (["The Chinese word for {x} is {a}."], ["英语单词 {x} 的意思是“{a}”。"]),
        "to English": (["“{x}” means {a} in English."], ["“{x}”的英语是 {a}。"]),
        "colour": (["The colour of {x} is {a}."], ["“{x}”的颜色是{a}。"]),
        "kind": (["{x} is a kind of {a}.", "{x} belongs to the group {a}."], ["“{x}”是一种{a}。", "“{x}”属于{a}。"]),
        "capital": (["The capital of {x} is {a}.", "{a} is the capital city of {x}."], ["{x}的首都是{a}。", "{a}是{x}的首都。"]),
        "day after": (["{a} comes after {x}."], ["{x}的后一天是{a}。"]),
        "day before": (["{a} comes before {x}."], ["{x}的前一天是{a}。"]),
        "month after": (["{a} follows {x}."], ["{x}的下一个月是{a}。"]),
        "number after": (["After {x} comes {a}."], ["{x} 的下一个数是 {a}。"]),
        "sum": (["{x} plus {y} is {a}."], ["{x} 加 {y} 等于 {a}。"]),
        "difference": (["{x} minus {y} is {a}."], ["{x} 减 {y} 等于 {a}。"]),
    }
    for skill, ways in say.items():
        for fact in facts(skill):
            for language in (0, 1):
                x, y, a = fact[language]
                told[language] += [way.format(x=x, y=y, a=a) for way in ways[language]]
    return told


def story(rng: random.Random, language: int) -> str:
    """Four made-up sentences about one person."""
    words = list(lexicon().items())
    kinds = {kind[0]: [pair[language] for pair in by_twos(line)] for kind, line in LEXICON.items()}
    name, friend = shuffled(rng, NAMES[language])[:2]
    animal, fruit, drink, hat, ride = (one(rng, kinds[k]) for k in ("animal", "fruit", "drink", "piece of clothing", "vehicle"))
    n, day = 2 + int(rng.random() * 7), one(rng, DAYS[language])
    word = one(rng, words)
    if language:
        return (f"{name}有一只{animal}，还有 {n} 个{fruit}。{day}，{name}坐{ride}去看{friend}。"
                f"{friend}给{name}一杯{drink}和一件新的{hat}。{friend}说：“{word[1]}”的英语是 {word[0]}。")
    return (f"{name} has one {animal} and {n} pieces of {fruit}. On {day} {name} takes the {ride} to see {friend}. "
            f"{friend} gives {name} some {drink} and a new {hat}. {friend} says: the Chinese word for {word[0]} is {word[1]}.")


def pretraining(rng: random.Random) -> list[dict]:
    """Lines of three or four statements in one language, the stories, and word lists, forwards and backwards."""
    lines = []
    for language, told in enumerate(statements()):
        for _ in range(2):
            mixed = shuffled(rng, told)
            lines += [("", " ")[language == 0].join(mixed[i:i + 4]) for i in range(0, len(mixed), 4)]
        lines += [story(rng, language) for _ in range(300)]
        vocabulary = list(lexicon().values() if language else lexicon())
        for _ in range(300):
            words = shuffled(rng, vocabulary)[:3]
            there, back = " ".join(words), " ".join(words[::-1])
            lines.append((f"{there}, again {there}, and backwards {back}.", f"{there}，再说一遍：{there}，倒过来：{back}。")[language])
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
