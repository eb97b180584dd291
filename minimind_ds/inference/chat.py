"""Talk to a trained model: load a run folder or an exported one, stream the answer, keep the history.

Generation is `transformers`' own, on the architecture a model is exported to (Qwen3, Qwen3-MoE or Llama), so what is
heard here is what an exported folder says.  The prompt is rendered by the same code as the training data.

    python launch/chat.py --weight out/sft --prompt "What is the opposite of hot?"
    python launch/chat.py --weight out/pretrain --raw --prompt "The sea is"
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from minimind_ds.checkpoint.weights import opened
from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError, first_line, one_line
from minimind_ds.config.model import ModelConfig
from minimind_ds.config.precision import DTYPES
from minimind_ds.config.untrusted import shown
from minimind_ds.convert import export, huggingface
from minimind_ds.convert.weight_files import Source
from minimind_ds.data.sample import prompt_ids
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.inference import arguments

# No answer is longer, no vocabulary larger.
MOST_TOKENS = 1 << 30
# A think block with nothing in it; its opening may have stood in the prompt.
EMPTY_THINK = re.compile(r"\s*(<think>)?\s*</think>\s*")


def main(argv: list[str]) -> int:
    """The whole of launch/chat.py.  Returns the exit code."""
    args = program_flags.chat().parse_args(argv)
    try:
        history, chosen = pairs_of(args), arguments.choose(args)
        if chosen.pretrained and not args.raw:
            chosen.notes.append("pretrained weights continue plain text (--raw)")
            args.raw = True
        if args.raw and (args.system or args.open_thinking):
            name = "--system" if args.system else "--open_thinking"
            raise UserError(f"{name} belongs to the chat format; --raw continues plain text")
        sampling = Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                            repetition_penalty=args.repetition_penalty, max_new_tokens=args.max_new_tokens)
        model, tok = load_model(**chosen.arguments, dtype=DTYPES.get(args.dtype), device=device_of(args))
        for note in chosen.notes:
            print(note, file=sys.stderr)
        if args.seed is not None:
            torch.manual_seed(args.seed % (1 << 63))
        talk = Chat(model, tok, sampling, args.system, history, args.open_thinking, args.raw, args.show_speed)
        if args.prompt is None:
            converse(talk)
        else:
            answer(talk, args.prompt)
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    return 0


def pairs_of(args: argparse.Namespace) -> int:
    """--history, or MiniMind's --historys.  Raises ValueError on both, on a negative one and on half a pair."""
    if args.historys is None:
        history = 8 if args.history is None else args.history
        if history < 0:
            raise UserError(f"--history is {history}; it must be at least 0")
        return history
    if args.history is not None:
        raise UserError("--history counts pairs and --historys their messages: give one")
    if args.historys < 0 or args.historys % 2:
        raise UserError(f"--historys is {args.historys}; it must be an even number, questions and answers together")
    return args.historys // 2


def device_of(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.  temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = export.SAMPLING["temperature"]
    top_p: float = export.SAMPLING["top_p"]
    top_k: int = export.SAMPLING["top_k"]
    repetition_penalty: float = export.SAMPLING["repetition_penalty"]
    max_new_tokens: int = 512

    def __post_init__(self):
        # Logits divided by less, or by more, are no numbers any more.
        least, most = 1e-4, 1e4
        for name, good, what in (("temperature", self.temperature == 0 or least <= self.temperature <= most,
                                  f"0, or from {least} to {most:g}"),
                                 ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                                 ("top_k", 0 <= self.top_k <= MOST_TOKENS, f"from 0 to {MOST_TOKENS:,}"),
                                 ("repetition_penalty", least <= self.repetition_penalty <= most,
                                  f"from {least} to {most:g}"),
                                 ("max_new_tokens", 1 <= self.max_new_tokens <= MOST_TOKENS,
                                  f"from 1 to {MOST_TOKENS:,}")):
            if not good:
                raise UserError(f"--{name} is {shown(getattr(self, name))}; it must be {what}")

    def generation_config(self, tok: Tokenizer, vocab_size: int) -> GenerationConfig:
        """The same for transformers; ids beyond the tokenizer's are never drawn."""
        drawn = dict(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        return GenerationConfig(**(drawn if self.temperature else dict(do_sample=False)),
                                repetition_penalty=self.repetition_penalty, max_new_tokens=self.max_new_tokens,
                                **export.generation(tok, vocab_size))


def load_model(weight: Source, tokenizer: str | None = None, *, dtype: torch.dtype | None = None,
               device: str = "cpu", lora: Source | None = None, shape: ModelConfig | None = None,
               inference_rope_scaling: bool = False) -> tuple[PreTrainedModel, Tokenizer]:
    """A run folder, its weights file, a checkpoint, a MiniMind .pth or an exported folder -> a transformers model in
    eval mode, and its tokenizer.

    Args:
        tokenizer: another than the one beside the weights.
        dtype: None keeps the precision of the file.
        lora: adapters to merge into the weights.
        shape: the model's, for a .pth, which does not carry it; its vocabulary may differ.
        inference_rope_scaling: positions beyond those trained, as MiniMind's flag of this name.

    Raises:
        ValueError: nothing there, several weights, weights, adapters or a configuration that do not fit, no
            tokenizer, one of another vocabulary, or no such device.
    """
    weight, lora = opened(weight), opened(lora)
    state, config = export.load(weight, lora=lora, shape=shape)
    if inference_rope_scaling:
        config = dataclasses.replace(config, inference_rope_scaling=True)
    tok = export.tokenizer_of(weight, tokenizer, lora)
    if tok.vocab_size > config.vocab_size:
        raise UserError(f"{weight}: these are weights of another tokenizer: {tok.name} has {tok.vocab_size} ids, "
                         f"the model {config.vocab_size}")
    return as_transformers(state, config, dtype or state["model.embed_tokens.weight"].dtype, device), tok


def usable(device: str) -> torch.device:
    """A device that this machine has.  Raises ValueError for any other."""
    try:
        target = torch.device(device)
        # A tensor on meta holds nothing.
        torch.ones(1, device=target).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device[:40]}: {first_line(error)}") from None
    return target


def as_transformers(state: dict[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype,
                    device: str = "cpu") -> PreTrainedModel:
    """Weights under our names as the transformers model that an export of them would load as.

    Raises:
        ValueError: no such device, or a model without a counterpart in transformers.
    """
    values, target = huggingface.to_hf_config(config, dtype), usable(device)
    hf_config = AutoConfig.for_model(**values)
    hf_config.architectures = values["architectures"]
    model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    state = dict(state)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # Names are transformers 5's own, experts included: nothing is missing and nothing left over.
    model.load_state_dict(state, strict=True)
    return model.to(target).eval()


def visible(text: str, final: bool = False) -> str:
    """The answer without an empty think block at its start; nothing yet while it may still turn out to be one."""
    if block := EMPTY_THINK.match(text):
        return text[block.end():]
    tight = "".join(text.split())
    undecided = "<think></think>".startswith(tight) or "</think>".startswith(tight)
    return "" if undecided and not final else text


class Stream(BaseStreamer):
    """What generate() calls with every token: passes on text as soon as it is certain.

    A character may take several tokens (SentencePiece falls back to bytes), so the replacement character at the end
    of a decoded prefix is held back until the next token settles it.

    Attributes: ids (tokens so far, the stop token included), times (of the first and the latest of them).
    """

    def __init__(self, tok: Tokenizer, write: Callable[[str], None], opening: str = "", raw: bool = False):
        self.tok, self.write, self.opening, self.raw = tok, write, opening, raw
        self.ids: list[int] = []
        self.times: list[float] = []
        self.written = 0
        self.in_prompt = True

    @property
    def text(self) -> str:
        """All of the answer so far, think block and all."""
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.tok.stop_ids else self.ids
        return self.opening + self.tok.decode(ids, skip_special=True)

    def put(self, value: torch.Tensor):
        if self.in_prompt:
            self.in_prompt = False
            return
        self.ids += value.flatten().tolist()
        self.times = [*self.times[:1], time.perf_counter()]
        text = self.text.rstrip("\N{REPLACEMENT CHARACTER}")
        self.pass_on(text if self.raw else visible(text))

    def end(self):
        self.pass_on(self.text if self.raw else visible(self.text, final=True))

    def pass_on(self, text: str):
        if len(text) > self.written:
            self.write(text[self.written:])
            self.written = len(text)

    def tokens_per_second(self) -> float:
        """After the first token, whose time is the prompt's; 0 when there was but one."""
        spent = self.times[-1] - self.times[0] if self.times else 0.0
        return (len(self.ids) - 1) / spent if spent else 0.0


def generate(model: PreTrainedModel, tok: Tokenizer, ids: list[int], sampling: Sampling, stream: Stream):
    """Continue one prompt into `stream`, to the stop token or max_new_tokens.

    A KeyboardInterrupt leaves what was generated in the stream, and passes on.
    """
    prompt_1T = torch.tensor([ids], device=model.device)
    config = sampling.generation_config(tok, model.config.vocab_size)
    try:
        with torch.inference_mode():
            model.generate(input_ids=prompt_1T, attention_mask=torch.ones_like(prompt_1T), generation_config=config,
                           streamer=stream)
    except KeyboardInterrupt:
        stream.end()
        raise


@dataclass
class Chat:
    """A conversation with a model.  `history` question-answer pairs go with each new question; 0: none.

    raw: continue plain text instead, each by itself, as pretraining showed it: a begin token, then the text.
    show_speed: tell each answer's tokens a second.
    """

    model: PreTrainedModel
    tok: Tokenizer
    sampling: Sampling
    system: str = ""
    history: int = 8
    open_thinking: bool = False
    raw: bool = False
    show_speed: bool = True
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, question: str, kept: int) -> list[dict]:
        """System prompt, the last `kept` pairs, the question."""
        past = self.turns[len(self.turns) - kept:]
        said = [{"role": role, "content": text} for pair in past for role, text in zip(("user", "assistant"), pair)]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *said, {"role": "user", "content": question}]

    def prompt(self, question: str) -> list[int]:
        """Token ids of the turns, the oldest left out until the answer fits the model's longest text.

        Raises:
            ValueError: the question alone is too long.
        """
        room = self.model.config.max_position_embeddings - self.sampling.max_new_tokens
        for kept in range(min(self.history, len(self.turns)), -1, -1):
            if self.raw:
                ids = [self.tok.bos_id, *self.tok.encode(question)]
            else:
                ids = prompt_ids(self.messages(question, kept), self.tok, open_thinking=self.open_thinking)
            if len(ids) <= room:
                return ids
        raise UserError(f"the {'text' if self.raw else 'question'} takes {len(ids)} tokens; with --max_new_tokens "
                         f"{self.sampling.max_new_tokens} there is room for {max(room, 0)}")

    def ask(self, question: str, write: Callable[[str], None]) -> Stream:
        """Stream the answer into `write`; it joins the history, a broken-off one too (KeyboardInterrupt).

        Raises:
            ValueError: a question that is too long.
        """
        ids = self.prompt(question)
        stream = Stream(self.tok, write, opening="<think>\n" if self.open_thinking else "", raw=self.raw)
        try:
            generate(self.model, self.tok, ids, self.sampling, stream)
        finally:
            if not self.raw:
                self.turns.append((question, stream.text))
        return stream


def say(text: str):
    """To the terminal at once; a character it cannot show is replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def answer(chat: Chat, question: str):
    """One turn on the terminal: the answer on stdout, its speed on stderr; Ctrl-C stops it."""
    try:
        stream = chat.ask(question, say)
    except KeyboardInterrupt:
        say("\n")
        print("[stopped]", file=sys.stderr)
        return
    say("\n")
    if chat.show_speed:
        print(f"[{len(stream.ids)} tokens, {stream.tokens_per_second():.1f} tokens/s]", file=sys.stderr)


COMMANDS = """/reset  forgets the conversation
/help   shows this
/exit   leaves, as Ctrl-D does; Ctrl-C stops an answer"""
LEAVE = "[Ctrl-C once more, Ctrl-D or /exit leaves]"


def converse(chat: Chat, lines: Callable[[str], str] = input):
    """Questions from the terminal until /exit, Ctrl-D or Ctrl-C twice; /reset (or /clear) forgets what was said."""
    print(COMMANDS, file=sys.stderr)
    warned = False
    while True:
        try:
            question = lines("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("" if warned else f"\n{LEAVE}", file=sys.stderr)
            if warned:
                return
            warned = True
            continue
        warned = False
        if question == "/exit":
            return
        if question in ("/reset", "/clear"):
            chat.turns.clear()
            print("[forgotten]", file=sys.stderr)
        elif re.fullmatch("/[a-z]*", question):
            # One word after a slash is a command that was meant, /help or a misspelt one.
            print(COMMANDS, file=sys.stderr)
        elif question:
            try:
                answer(chat, question)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
