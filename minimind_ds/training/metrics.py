"""What a run reports: metrics.jsonl (one object an optimizer step), a progress bar, and optionally wandb, TensorBoard.

    python -c "import json; print([json.loads(l)['loss'] for l in open('out/metrics.jsonl') if '\\"loss\\"' in l][-1])"
"""

from __future__ import annotations

import json
import pathlib
import re
import secrets
import sys

from tqdm import tqdm

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig
from minimind_ds.io import write_file


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
        total_steps: for the bar and its remaining time.
        resolved: the run's configuration, shown by wandb.
    """

    def __init__(self, folder: pathlib.Path, *, step: int, total_steps: int, run, rank: int, resolved: dict):
        self.rank, self.empty = rank, False
        if rank != 0:
            return
        path = folder / "metrics.jsonl"
        keep_until(path, step)
        self.empty = not path.exists() or not path.stat().st_size
        self.file = path.open("a", encoding="utf-8")
        self.log_interval = run.log_interval
        self.total_steps = total_steps
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr,
                        disable=not sys.stderr.isatty())
        self.wandb = self.board = None
        if run.use_wandb:
            import wandb

            self.wandb = wandb.init(project=run.wandb_project, dir=str(folder), config=resolved, resume="allow",
                                    id=wandb_id(folder), name=folder.resolve().name)
        if run.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: dict) -> None:
        """One line; `line` has at least 'step' and is finite JSON."""
        if self.rank != 0:
            return
        self.file.write(json.dumps(line) + "\n")
        # To the operating system at once: a killed process loses no step it reported.
        self.file.flush()
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        if self.wandb:
            self.wandb.log(numbers, step=line["step"])
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, line["step"])
        if "eval_loss" in line:
            loss, perplexity = line["eval_loss"], line.get("eval_perplexity")
            self.say(f"step {line['step']}: eval loss {'not finite' if loss is None else f'{loss:.4f}'}"
                     + (f", perplexity {perplexity:.4g}" if perplexity is not None else ""))
        elif "loss" in line:
            self.show(line)

    def show(self, line: dict) -> None:
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        self.bar.update(line["step"] - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss}, {line['tokens_per_s']:,.0f} tokens/s")
        if self.bar.disable and (line["step"] % self.log_interval == 0 or line["step"] == self.total_steps):
            left = (self.total_steps - line["step"]) * line["step_s"]
            print(f"step {line['step']}/{self.total_steps}  loss {loss}  lr {line['lr']:.2e}  "
                  f"{line['tokens_per_s']:,.0f} tokens/s  {left / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        """A line for the user, above the bar."""
        if self.rank == 0:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self.rank != 0:
            return
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.board:
            self.board.close()


def wandb_id(folder: pathlib.Path) -> str:
    """The run's id at Weights & Biases, kept in the run folder so that a resumed run continues its curves."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    found = untrusted.read_text(path).strip()
    if not re.fullmatch(r"[\w-]{1,64}", found):
        raise UserError(f"{path} holds {untrusted.shown(found)}, which is no run's id at Weights & Biases: delete it")
    return found
