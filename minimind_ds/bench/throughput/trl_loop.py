"""Hugging Face TRL's SFTTrainer on our rows, a step at a time, to be timed in turns with our own step.

Imports trl: bench/throughput/trl_ratio.py looks first whether it is there.

    python launch/benchmark.py --compare trl --preset debug
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator

import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers
import trl
from torch import Tensor

from minimind_ds.bench.throughput.cell import full_steps
from minimind_ds.bench.throughput.loops import Loop, adamw
from minimind_ds.convert import export
from minimind_ds.data import IGNORE
from minimind_ds.training.prepare import PreparedRun

# Samples that TRL packs by itself, to say how full its own rows are.
SAMPLED = 20_000


class Turns(transformers.TrainerCallback):
    """Halts the trainer before its first step and after each until it is told to go on."""

    def __init__(self):
        self.go, self.halted, self.ended = threading.Semaphore(0), threading.Semaphore(0), False

    def on_train_begin(self, args, state, control, **_):
        self.halt()

    def on_step_end(self, args, state, control, **_):
        self.halt()
        control.should_training_stop |= self.ended
        return control

    def halt(self):
        self.halted.release()
        self.go.acquire()


class Stepwise(trl.SFTTrainer):
    """`train()` as it is, in a thread of its own; keeps each step's loss."""

    # Summed over the step's micro-batches; of this rank, times the ranks.
    step_loss: Tensor | float = 0.0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss + loss
        return loss

    def begin(self) -> None:
        """Everything that train() does before its first step.  Raises whatever train() raises."""
        self.turns, self.failed = Turns(), None
        self.add_callback(self.turns)
        # It prints a summary at the end.
        self.remove_callback(transformers.PrinterCallback)
        self.thread = threading.Thread(target=self.run, daemon=True, name="trl")
        self.thread.start()
        self.wait()

    def run(self) -> None:
        try:
            # Which GPU is current belongs to a thread.
            if self.args.device.type == "cuda":
                torch.cuda.set_device(self.args.device)
            self.train()
        # Whatever it is belongs to whoever waits for the step.
        except BaseException as error:
            self.failed = error
        finally:
            self.turns.halted.release()

    def wait(self) -> None:
        self.turns.halted.acquire()
        if self.failed is not None:
            raise self.failed

    def one_step(self) -> Tensor:
        """Trains once.  -> the step's loss, this rank's share times the ranks."""
        self.step_loss = 0.0
        self.turns.go.release()
        self.wait()
        return self.step_loss

    def end(self) -> None:
        self.turns.ended = True
        self.turns.go.release()
        self.thread.join()


def build(prepared: PreparedRun, start: dict, steps: int) -> Stepwise:
    """SFTTrainer over the exported model and the plan's own rows; collective.

    Args:
        start: weights both contenders start from, in our names.
        steps: how many the trainer is going to be asked for.
    """
    run, world = prepared.run, prepared.world
    half = {"bf16": run.dtype == "bf16", "fp16": run.dtype == "fp16"}
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, alone(world.size):
        exported = pathlib.Path(folder) / "hf"
        export.export_hf(start, prepared.model_config, prepared.tokenizer, exported, dtype=torch.float32)
        # TRL's own precision: fp32 weights, autocast.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            exported, dtype=torch.float32, attn_implementation=attention(world.device, run.dtype))
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
        model.to(world.device)
        arguments = trl.SFTConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=run.batch_size,
            gradient_accumulation_steps=run.accumulation_steps, learning_rate=run.learning_rate,
            lr_scheduler_type="constant", max_grad_norm=run.grad_clip, **half, use_cpu=world.device.type == "cpu",
            gradient_checkpointing=run.gradient_checkpointing, use_liger_kernel=liger(world.device),
            packing=True, packing_strategy="bfd", max_length=run.row_len, shuffle_dataset=False,
            # The rows are packed, and in our order.
            dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
            # DistributedDataParallel's search for parameters without a gradient costs time, and there are none.
            ddp_find_unused_parameters=False, seed=run.seed, save_strategy="no", eval_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True)
        # Otherwise one process would take every GPU it sees.
        arguments._n_gpu = min(1, arguments.n_gpu)
        rows = datasets.Dataset.from_list(rows_of(prepared, steps))
        return Stepwise(model=model, args=arguments, train_dataset=rows,
                        processing_class=tokenizer, optimizers=(adamw(prepared, model.parameters()), None))


@contextlib.contextmanager
def alone(ranks: int) -> Iterator[None]:
    """One rank without a launcher's variables: accelerate would wrap the model in DistributedDataParallel."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE") if ranks == 1 else ()
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def attention(device: torch.device, dtype: str) -> str:
    """The fastest that transformers has here and that keeps packed samples apart."""
    if device.type == "cuda" and dtype != "fp32":
        if transformers.utils.is_flash_attn_3_available():
            return "flash_attention_3"
        if transformers.utils.is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


def liger(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def rows_of(prepared: PreparedRun, steps: int) -> list[dict]:
    """The plan's rows as TRL's packing writes them, in the order in which the ranks' batches are dealt out.

    Labels are those of the tokens themselves: transformers looks one place ahead, we have looked already.
    """
    plan, store, run = prepared.first_plan, prepared.stores[0], prepared.run
    found = []
    for at in range(min(steps, full_steps(prepared))):
        for micro in range(run.accumulation_steps):
            for rank in range(prepared.data_parallel_size):
                for row in plan.micro_batch_rows(at, rank, micro, ranks=prepared.data_parallel_size,
                                                 accumulation=run.accumulation_steps, batch_size=run.batch_size):
                    ids, labels = store.read(np.array(row))
                    own = np.concatenate([[IGNORE], labels[:-1]])
                    found.append({"input_ids": ids.tolist(), "labels": own.tolist(),
                                  "seq_lengths": store.lengths[row].tolist()})
    return found


def loop(prepared: PreparedRun, trainer: Stepwise, name: str) -> Loop:
    state = {"at": 0}

    def step():
        facts = prepared.first_plan.facts(state["at"] % full_steps(prepared))
        state["at"] += 1
        loss = trainer.one_step().double()
        if prepared.world.size > 1:
            dist.all_reduce(loss)
        return facts.n_tokens, loss.item() / prepared.world.size

    return Loop(name, step)


@torch.no_grad()
def leak(prepared: PreparedRun, trainer: Stepwise) -> tuple[int, int] | None:
    """Elements of a batch's outputs that move when its first sample's tokens change: (its own, other samples').

    Of the first batch with two samples, as TRL's collator lays it out, in the run's precision, by the model that is
    trained; None if no batch has two.  Outputs are the last hidden states; of a mixture of experts those of the first
    layer's attention, since an expert's rounding depends on how many tokens it has.
    """
    device, rows, size = prepared.world.device, trainer.train_dataset, prepared.run.batch_size
    batches = ([rows[at + i] for i in range(size)] for at in range(0, len(rows), size))
    batch = next((b for b in batches if sum(len(row["seq_lengths"]) for row in b) > 1), None)
    if batch is None:
        return None
    inputs = trainer.data_collator(batch)
    del inputs["labels"]
    inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    first, changed = batch[0]["seq_lengths"][0], inputs["input_ids"].clone()
    changed[:, :first] = (changed[:, :first] + 1) % prepared.model_config.vocab_size
    model, attended, found = trainer.model.eval().base_model, [], []
    hook = model.layers[0].self_attn.register_forward_hook(lambda module, args, out: attended.append(out[0]))
    with torch.autocast(device.type, torch.float16 if prepared.run.dtype == "fp16" else torch.bfloat16,
                        enabled=prepared.run.dtype != "fp32"):
        for ids in (inputs["input_ids"], changed):
            found.append(model(**{**inputs, "input_ids": ids}, use_cache=False).last_hidden_state)
    hook.remove()
    trainer.model.train()
    before, after = attended if prepared.model_config.use_moe else found
    moved = (before != after)[0]
    return int(moved[:first].sum()), int(moved[first:].sum())


def own_fill(prepared: PreparedRun) -> float:
    """How full TRL's own packing (best fit decreasing, a thousand samples at a time) makes its rows of this data."""
    datasets.disable_progress_bars()
    lengths = prepared.stores[0].lengths[:SAMPLED].tolist()
    samples = datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
    packed = trl.pack_dataset(samples, prepared.run.row_len, "bfd")
    return sum(lengths) / (len(packed) * prepared.run.row_len)
