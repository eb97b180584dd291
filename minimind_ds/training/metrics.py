"""What a run reports: metrics.jsonl (one object an optimizer step), a bar on a terminal and else a line now and then,
and optionally wandb, TensorBoard.

    python -c "import json; print([json.loads(l)['loss'] for l in open('out/metrics.jsonl') if '\\"loss\\"' in l][-1])"
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from minimind_ds import terminal
from minimind_ds.config import untrusted
from minimind_ds.config.model import ModelConfig
from minimind_ds.io import write_file
from minimind_ds.training.boards import Boards

BAR = "{n_fmt}/{total_fmt} |{bar}| {desc}"
# Steps whose times say how long the rest takes.
RECENT = 32


def flops_per_token(config: ModelConfig, mean_keys: float) -> float:
    """Training FLOPs of one token: 6 × matmul parameters (tied head included) + 12 · L · (H·D) · mean keys attended.

    For mixtures of experts only the experts a token visits count.
    """
    C, D, L = config.hidden_size, config.head_dim, config.num_hidden_layers
    attention = C * D * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    if config.use_moe:
        mlp = 3 * C * config.moe_intermediate_size * config.num_experts_per_tok + C * config.num_experts
    else:
        mlp = 3 * C * config.intermediate_size
    matmul = L * (attention + mlp) + config.vocab_size * C
    return 6.0 * matmul + 12.0 * L * config.num_attention_heads * D * mean_keys


def keep_until(path: pathlib.Path, step: int) -> None:
    """Drop the lines of a metrics file that a resumed run will write again, and a torn last line; all at step 0."""
    kept = []
    for line in untrusted.lines(path):
        try:
            if step and json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            # Killed while writing this line: the step is run again.
            continue
    if path.exists():
        write_file(path, b"".join(kept))


class Metrics:
    """Writes every step on rank 0; does nothing elsewhere.

    Args:
        folder: the run folder.
        step: the step a resumed run continues after (0: a new run).
        total_steps, steps_an_epoch: how long the run is, and an epoch.
        log: takes lines for the run's log that a bar hides from the screen.
        resolved: the run's configuration, shown by wandb.
    """

    def __init__(self, folder: pathlib.Path, *, step: int, total_steps: int, steps_an_epoch: int, run, rank: int,
                 resolved: dict, log: Callable[[str], None] = lambda line: None):
        self.rank, self.empty, self.bar = rank, False, None
        if rank != 0:
            return
        path = folder / "metrics.jsonl"
        keep_until(path, step)
        self.empty = not path.exists() or not path.stat().st_size
        self.file = path.open("a", encoding="utf-8")
        self.run, self.log, self.first = run, log, step
        self.total_steps, self.steps_an_epoch = total_steps, steps_an_epoch
        self.began, self.steps, self.tokens, self.step_seconds = time.monotonic(), 0, 0, 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.boards = Boards(folder, run, step=step, resolved=resolved, say=self.say)

    def begin(self) -> None:
        """The steps begin: from here on it is their time, and a terminal shows a bar."""
        if self.rank != 0:
            return
        self.began = time.monotonic()
        if sys.stderr.isatty():
            # The screen's own stream: a bar is nothing for a log.
            self.bar = tqdm(total=self.total_steps, initial=self.first, bar_format=BAR, **terminal.bar_width(),
                            file=sys.__stderr__)

    def write(self, line: dict) -> None:
        """One line; `line` has at least 'step' and is finite JSON."""
        if self.rank != 0:
            return
        self.file.write(json.dumps(line) + "\n")
        # To the operating system at once: a killed process loses no step it reported.
        self.file.flush()
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        self.boards.write(numbers, line["step"])
        if "eval_loss" in line:
            loss, perplexity = line["eval_loss"], line.get("eval_perplexity")
            self.say(f"step {line['step']}: eval loss {'not finite' if loss is None else f'{loss:.4f}'}"
                     + (f", perplexity {perplexity:.4g}" if perplexity is not None else ""))
        elif "loss" in line:
            self.show(line)

    def show(self, line: dict) -> None:
        self.steps += 1
        self.tokens += line["tokens"]
        self.step_seconds += line["step_s"]
        self.recent.append(line["step_s"])
        left = terminal.duration((self.total_steps - line["step"]) * statistics.median(self.recent))
        said = (f"loss {'not finite' if line['loss'] is None else format(line['loss'], '.4f')}  lr {line['lr']:.1e}  "
                f"{rate(line['tokens_per_s'])}  epoch {line['step'] / self.steps_an_epoch:.2f}/{self.run.epochs:g}  "
                f"{left} left")
        if self.bar:
            self.bar.set_description_str(said, refresh=False)
            self.bar.update(line["step"] - self.bar.n)
        # The first step of a start, too, which says how long the next line may take.
        if line["step"] % self.run.log_interval == 0 or line["step"] == self.total_steps or self.steps == 1:
            (self.log if self.bar else self.say)(f"step {line['step']}/{self.total_steps}  {said}")

    def say(self, text: str) -> None:
        """A line for the user, above the bar."""
        if self.rank != 0:
            return
        if self.bar:
            self.bar.clear()
        print(text, flush=True)
        if self.bar:
            self.bar.refresh()

    def taken(self) -> str:
        """The time since begin() and the mean rate of its steps, for a line; '' where there were none."""
        if not self.step_seconds:
            return ""
        return (f": {terminal.count(self.steps, 'step')} in {terminal.duration(time.monotonic() - self.began)}, "
                f"{rate(self.tokens / self.step_seconds)} on average")

    def end_bar(self) -> None:
        """The bar stays as it is; what is said from here on comes below it."""
        if self.bar:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        if self.rank != 0:
            return
        self.end_bar()
        self.file.close()
        self.boards.close()


def rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s < 1e5 else f"{tokens_per_s / 1e3:,.0f}k tokens/s"
