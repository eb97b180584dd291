"""The law of the template: what an export of this run renders and tokenises is what the run is trained on.

    python launch/verify.py --deepspeed ds_configs/zero2.json
"""

from __future__ import annotations

import math
import pathlib
import tempfile

from minimind_ds.config.precision import DTYPES
from minimind_ds.convert import export
from minimind_ds.data.sample import build_samples, prompt_ids
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.training.prepare import PreparedRun

from .checks import Check

# Longer than any of the conversations.
LONGEST = 1 << 16


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = said("user", "What is the opposite of hot?"), said("assistant", "Cold.")
CLOCK = {"type": "function", "function": {
    "name": "clock", "description": "The time \u2026 in a \"city\"",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CALL = {"name": "clock", "arguments": {"city": "\u5317\u4eac", "at": [1, True, None, 0.5]}}
CALLED = said("assistant", "", tool_calls=[CALL])
SEVERAL = said("assistant", "Both.", tool_calls=[{"type": "function", "function": CALL},
                                                 {"name": "clock", "arguments": "{\"city\": \"Oslo\"}"}])
# Name -> turns and what goes with them: tools, or how a prompt is left open for an answer.
CONVERSATIONS: dict[str, tuple[list[dict], dict]] = {
    "one turn": ([ASKED, ANSWERED], {}),
    "a system prompt": ([said("system", "Be brief."), ASKED, ANSWERED], {}),
    "a later system prompt": ([ASKED, ANSWERED, said("system", "Be brief."), ASKED, ANSWERED], {}),
    "several turns": ([ASKED, ANSWERED, said("user", "And of up?"), said("assistant", "Down.")], {}),
    "white space and scripts": ([said("user", " \n\u4f60\u597d\uff0c \U0001f600\n\n\tx"),
                                 said("assistant", "\n\n  a\n\n```py\nx = 1\n```\n")], {}),
    "reasoning": ([ASKED, {**ANSWERED, "reasoning_content": "\nhot,\n\nthen cold\n"}, ASKED, ANSWERED], {}),
    "a think block in the answer": ([ASKED, said("assistant", "<think>\nhm\n</think>\n\nCold.")], {}),
    "tools": ([ASKED, ANSWERED], {"tools": [CLOCK, CLOCK]}),
    "tools and a system prompt": ([said("system", "Be brief."), ASKED, ANSWERED], {"tools": [CLOCK]}),
    "a tool call": ([ASKED, CALLED], {"tools": [CLOCK]}),
    "tool calls and answers": ([ASKED, SEVERAL, said("tool", "12:05"), said("tool", "{\"h\": 6}"), ANSWERED],
                               {"tools": [CLOCK]}),
    "a prompt": ([said("system", "Be brief."), ASKED, ANSWERED, ASKED], {"add_generation_prompt": True}),
    "a prompt after a tool's answer": ([ASKED, CALLED, said("tool", "12:05")],
                                       {"tools": [CLOCK], "add_generation_prompt": True}),
    "a prompt to think": ([ASKED], {"add_generation_prompt": True, "open_thinking": True}),
}


def trained_ids(turns: list[dict], tok: Tokenizer, *, tools: list | None = None, add_generation_prompt: bool = False,
                open_thinking: bool = False) -> list[int]:
    """What training makes of a conversation, or chat of a prompt."""
    if add_generation_prompt:
        return prompt_ids(turns, tok, tools, open_thinking)
    return build_samples([{"messages": turns, "tools": tools}], tok, LONGEST)[0].ids


def exported_ids(turns: list[dict], theirs, **options) -> list[int]:
    """What transformers makes of it."""
    text = theirs.apply_chat_template(turns, tokenize=False, **options)
    return theirs(text, add_special_tokens=False).input_ids


def template_law(prepared: PreparedRun) -> list[Check]:
    """CONVERSATIONS through the renderer, and through the folder that export writes as transformers reads it."""
    from transformers import AutoTokenizer

    tok = prepared.tokenizer
    try:
        with tempfile.TemporaryDirectory() as folder:
            export.write_companions(pathlib.Path(folder), prepared.model_config, tok, DTYPES[prepared.run.dtype])
            theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        differ = [name for name, (turns, options) in CONVERSATIONS.items()
                  if exported_ids(turns, theirs, **options) != trained_ids(turns, tok, **options)]
    # Templates and tokenizers end in errors of any kind.
    except Exception as error:
        return [Check("template", f"ended with {type(error).__name__}: {' '.join(str(error).split())[:300]}", math.inf,
                      0)]
    named = f": {', '.join(differ)}" if differ else ""
    return [Check("template", f"of {len(CONVERSATIONS)} conversations, those whose ids differ in transformers, by the "
                              f"exported template{named}", len(differ), 0)]
