"""A run, prepared: everything that can fail by a user's mistake is read, checked and resolved here.

Every rank prepares alone, before any rank talks to another, so that a mistake ends all of them with one line and exit
code 2 instead of a hang.

    deepspeed launch/sft.py --deepspeed ds_configs/zero1.json
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from minimind_ds import checkpoint, kernels
from minimind_ds.config import deepspeed_check, deepspeed_json, rates, run_checks
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.config.precision import DTYPES
from minimind_ds.config.run import RunConfig, parse_run_config
from minimind_ds.config.run_flags import KINDS, PROGRAMS
from minimind_ds.config.untrusted import shown_path
from minimind_ds.convert import weight_files
from minimind_ds.data import loader, sources
from minimind_ds.data.conversation import notes as data_notes
from minimind_ds.data.files import Source, expand, passed_over
from minimind_ds.data.hf_folder import template_notes
from minimind_ds.data.sample import POLICIES
from minimind_ds.data.sources import Mixture, mix, whole_passes
from minimind_ds.data.store import TokenStore, open_or_build
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.distributed import sequence_parallel
from minimind_ds.distributed.deepspeed_compat import choose_accelerator
from minimind_ds.distributed.world import World
from minimind_ds.io import fsync
from minimind_ds.model.decoder import kernel_requirements
from minimind_ds.model.lora import Lora, find_targets, fingerprint
from minimind_ds.paths import cache_folder, is_bare
from minimind_ds.resilience import restarts
from minimind_ds.training import disk, lr_schedule, memory, starting_weights

# What a run writes into its folder, besides weights and checkpoints.
OWN_FILES = ("metrics.jsonl", "attempts.json", "DONE", "run.yaml", "ds_config.json", "last.json", "best.json",
             "wandb_id", ".lock", "checkpoints/latest")
# Likewise, and no run ends for want of them.
OWN_NOTES = ("run.log", "starts.json", "report.html")


class EvalSet(NamedTuple):
    """The held-out samples of one source."""

    name: str
    store: Mixture
    plan: loader.EpochPlan


@dataclass(frozen=True)
class PreparedRun:
    """A run in which nothing can still fail by a user's mistake; what changes while it trains is live.LiveRun's."""

    run: RunConfig
    world: World
    dims: ParallelDims
    tokenizer: Tokenizer
    model_config: ModelConfig
    stores: list[Mixture]
    eval_sets: tuple[EvalSet, ...]
    first_plan: loader.EpochPlan
    ds: dict
    kernels: kernels.KernelSelection
    start_weights: dict | None
    notes: tuple[str, ...]
    lora: Lora | None = None
    kind: str = "conversations"

    @property
    def stage(self) -> int:
        return deepspeed_json.stage_of(self.ds)

    @property
    def keeps_checkpoints(self) -> bool:
        """False where nothing could go on from one."""
        return deepspeed_json.keeps_checkpoints(self.ds)

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of ranks that share rows, that the rows of a step are divided among."""
        return self.world.size // self.dims.sequence

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, if every epoch has as many as the first; packing may add or save a row."""
        return lr_schedule.total_steps(self.run, len(self.first_plan))

    def plan(self, epoch: int) -> loader.EpochPlan:
        """An epoch's plan, made when the epoch begins: the start of a run does not wait for all of them."""
        if epoch == 0:
            return self.first_plan
        return plan_epoch(self.stores[epoch], self.run, self.data_parallel_size, epoch)

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.run.save_dir)

    @property
    def done_path(self) -> pathlib.Path:
        """Written last of all: the run is finished."""
        return self.folder / "DONE"

    @property
    def weights_path(self) -> pathlib.Path:
        return weights_path(self.run, self.model_config, self.lora)


def weights_path(run: RunConfig, config: ModelConfig, lora: Lora | None) -> pathlib.Path:
    """Where a run's weights go in the end."""
    name = f"{run.save_weight}_lora" if lora else run.save_weight
    return pathlib.Path(run.save_dir) / weight_files.file_name(name, config)


def prepare(program: str, argv: list[str], world: World, *, deepspeed: str | None = None) -> PreparedRun:
    """Read, check and resolve everything.

    Args:
        deepspeed: a file in place of the one that argv names.

    Raises:
        ValueError: one clear line about the user's input.
    """
    choose_accelerator(world.device)
    run = parse_run_config(argv, program, PROGRAMS[program])
    if deepspeed is not None:
        run = run.replace(deepspeed=deepspeed)
    raw = deepspeed_json.read(run)
    deepspeed_json.check_keys(run.deepspeed, raw)
    chosen_here = run.preset is None and not run.model
    run, notes = choose(run, world)
    run, found = find_start_weights(run)
    run, weights, of_checkpoint = starting_weights.open_weights(run)
    if chosen_here:
        run, notes[0] = starting_weights.own_model(run, weights, notes[0])
    notes += found + of_checkpoint
    # Adapters stand in the layers, whatever the vocabulary.
    run, lora = choose_lora(run, run.model_config(1))
    run, tokenizer, model_config, of_weights = starting_weights.tokenizer_and_model(run, weights)
    notes += of_weights
    check_writable(pathlib.Path(run.save_dir))
    if (final := weights_path(run, model_config, lora)).exists() and not final.is_file():
        raise UserError(f"{final} is no file, and the run's weights go there in the end: move it, or name another "
                        "--save_weight")
    check_inputs(run, final)
    stores, held_out, of_data = read_data(program, run, tokenizer, progress=world.rank == 0)
    notes += of_data
    # The JSON may own the batch sizes that the plan depends on; a scheduler's "auto" needs the plan's steps.
    dims = sequence_parallel.read_dims(run.deepspeed, raw, world.size)
    ranks = max(1, world.size // dims.sequence)
    facts = dict(ranks=ranks, device=world.device.type)
    ds, run = deepspeed_json.resolve(raw, run, model_config, total_steps=0, **facts)
    notes += rates.notes(program, run) + deepspeed_json.notes(raw, run)
    sequence_parallel.check(dims, model_config, ranks=world.size, row_tokens=run.batch_size * run.row_len,
                   stage=deepspeed_json.stage_of(ds), path=run.deepspeed)
    if lora is not None and dims.experts > 1:
        raise UserError(f"{run.deepspeed}: expert_parallel shares out experts to train, and LoRA leaves them as they "
                         "are; leave it out, or --lora_rank 0")
    spec = kernels.with_compiled(run.kernels) if run.compile else run.kernels
    selection = kernels.resolve(spec, world.device, DTYPES[run.dtype], kernel_requirements(model_config))
    check_machine(run, ds, world, model_config)
    # Without labels there are no logits either: the least that it can be.
    least = memory.setting(run, ds, world, model_config, dims, lora, selection, labelled=0)
    notes += memory.check(least, memory.of_a_rank(world))
    notes += disk.check(run, ds, model_config, lora, experts=dims.experts)
    plan = plan_epoch(stores[0], run, ranks, 0)
    run_checks.check_step(run, ranks, plan.n_rows)
    notes += lr_schedule.notes(run, lr_schedule.total_steps(run, len(plan)))
    eval_sets = split_by_source(held_out, run, ranks)
    start_weights = starting_weights.load(run, model_config, weights)
    if lora is not None:
        lora = replace(lora, base=fingerprint(start_weights))
    prepared = PreparedRun(run, world, dims, tokenizer, model_config, stores, eval_sets, plan, ds, selection,
                           start_weights, tuple(notes), lora,
                           KINDS[program])
    if "scheduler" in raw:
        ds, run = deepspeed_json.resolve(raw, run, model_config, total_steps=prepared.total_steps, **facts)
        prepared = replace(prepared, ds=ds, run=run)
    return prepared


def choose(run: RunConfig, world: World) -> tuple[RunConfig, list[str]]:
    """Fill in what the user left to the program; the notes say what was chosen and why."""
    notes, cuda = [], world.device.type == "cuda"
    if run.preset is None:
        room = memory.of_a_rank(world) / 2**30 if cuda else 0
        run = run.replace(preset="minimind-3" if room >= 12 else "debug")
        why = f"{room:.0f} GiB of GPU memory" if cuda else "no GPU"
        notes.append(f"preset {run.preset}, chosen for this machine ({why}); --preset names another")
    if run.dtype is None:
        if cuda:
            dtype = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        else:
            dtype = "fp32" if kernels.why_slow(world.device, torch.bfloat16) else "bf16"
        run = run.replace(dtype=dtype)
    if run.from_resume != "auto" and restarts.has_own_checkpoint(pathlib.Path(run.save_dir)):
        notes.append(f"started again by itself: from this job's own checkpoint, not --from_resume {run.from_resume}")
        run = run.replace(from_resume="auto")
    if "learning_rate" not in run.given and run.from_resume not in ("none", "0"):
        # Defaults change between releases; a run goes on with the rate that it began with.
        began = checkpoint.peek(run.from_resume, pathlib.Path(run.save_dir)).get("learning_rate")
        run = run.replace(learning_rate=began if isinstance(began, (int, float)) else run.learning_rate)
    if run.cache_dir is None:
        run = run.replace(cache_dir=str(cache_folder()))
    return run, notes


def find_start_weights(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """--from_weight as a path, and a note where it was a bare name, as MiniMind's: weights of this model's size."""
    name = run.from_weight
    if name == "none" or not is_bare(name):
        return run, []
    # The vocabulary, which the tokenizer tells later, is no part of a file's name.
    config = run.model_config(vocab_size=1)
    path = weight_files.find_bare(run.place("from_weight"), [name], (run.save_dir, "out"), config)
    return run.replace(from_weight=str(path)), [f"{run.place('from_weight')} {name}: starts from {path}"]


def choose_lora(run: RunConfig, config: ModelConfig) -> tuple[RunConfig, Lora | None]:
    """The run's adapters, but for their base's fingerprint; the run with what was left to the program filled in."""
    if run.lora_rank == 0:
        return run, None
    targets = find_targets(config, run.lora_targets)
    alpha = float(run.lora_rank if run.lora_alpha is None else run.lora_alpha)
    lora = Lora(rank=run.lora_rank, alpha=alpha, targets=targets, dropout=run.lora_dropout)
    return run.replace(lora_alpha=alpha, lora_targets=",".join(targets)), lora


def fp16_runs() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().is_fp16_supported()


def check_machine(run: RunConfig, ds: dict, world: World, config: ModelConfig) -> None:
    """Raises ValueError for what the DeepSpeed file asks for and this machine has not."""
    path, zero = run.deepspeed, ds.get("zero_optimization", {})
    memory.check_size(config)
    if run.dtype == "fp16" and not fp16_runs():
        raise UserError(f"fp16 ({run.place('dtype')}): DeepSpeed has no fp16 on this machine's processor; use bf16 "
                         "or fp32")
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if zero.get(key) and world.device.type == "cpu":
            raise UserError(f"{path}: zero_optimization.{key} needs a GPU: DeepSpeed has the kernels of ZeRO++ for "
                             "GPUs only")
    shards = zero.get("zero_hpz_partition_size", 1)
    if world.size % shards:
        raise UserError(f"{path}: zero_optimization.zero_hpz_partition_size {shards} does not divide the "
                         f"{world.size} ranks of this run; it is meant to be the ranks of one machine")
    deepspeed_check.check_packages(path, ds)
    if deepspeed_json.builds_optimizer(ds) and not all(map(shutil.which, ("g++", "ninja"))):
        raise UserError(f"{path}: DeepSpeed builds this optimizer at first use, which needs g++ and ninja on the "
                        "PATH; install them, or leave the optimizer block and offload_optimizer out")
    for block in ("offload_optimizer", "offload_param"):
        if (zero.get(block) or {}).get("device") == "nvme":
            check_nvme(f"{path}: zero_optimization.{block}", zero[block])
    if run.stop_after and not deepspeed_json.keeps_checkpoints(ds):
        raise UserError(f"{run.place('stop_after')} is {run.stop_after}, and with optimizer states on NVMe ({path}) "
                        "there is no checkpoint to go on from: leave it out")
    if deepspeed_json.optimizer_device(ds) == "nvme" and run.save_interval:
        raise UserError(f"{path}: no checkpoints with optimizer states on NVMe: DeepSpeed forgets Adam's moments "
                         "when it loads them; --save_interval 0 trains without, offload_optimizer to \"cpu\" keeps "
                         "them")


def check_nvme(where: str, block: dict) -> None:
    """Raises ValueError unless states can be kept on disk: a folder to write to, and libaio."""
    folder = block.get("nvme_path")
    try:
        tempfile.TemporaryFile(dir=folder or os.devnull).close()
    except (OSError, TypeError):
        raise UserError(f"{where}.nvme_path is {folder!r}, which is no folder this machine can write to; name one on "
                         "its NVMe disk") from None
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(f"{where}.device is nvme, which needs libaio to build against (Debian: libaio-dev); install "
                         "it, or offload to \"cpu\"")


def check_inputs(run: RunConfig, final: pathlib.Path) -> None:
    """Raises UserError where the run would write over what it reads, or read what it writes at its next start."""
    folder = os.path.realpath(run.save_dir)
    own = {os.path.join(folder, name) for name in (*OWN_FILES, *OWN_NOTES, final.name)}
    given = [entry for paths in (run.data_path, run.eval_path) if paths
             for entry in (paths if isinstance(paths, list) else [paths])]
    given = [entry["path"] if isinstance(entry, dict) else entry for entry in given]
    for path in given:
        place = os.path.realpath(path)
        for inside, flag in ((folder, "save_dir"), (os.path.realpath(run.cache_dir), "cache_dir")):
            if os.path.isdir(place) and pathlib.Path(inside).is_relative_to(place):
                raise UserError(f"{run.place(flag)} {inside} lies in the data folder {shown_path(path)}, and would be "
                                "read as data at the next start: name another")
    for path in (*(str(source.path) for entry in given for source in expand(entry)), run.from_weight):
        if os.path.realpath(path) in own and os.path.isfile(path):
            raise UserError(f"{shown_path(path)} is a file that the run itself writes: it would be lost; move it, or "
                            "name another --save_dir")
    # Every start leaves its notes beside the weights, before there are any.
    if final.exists() and not any(os.path.exists(os.path.join(folder, name)) for name in (*OWN_FILES, *OWN_NOTES)):
        raise UserError(f"{final} is not of a run in this folder, and would be lost: move it, or name another "
                        f"{run.place('save_dir')}")


def check_writable(folder: pathlib.Path) -> None:
    """Raises ValueError unless files can be made in the folder; makes it if need be."""
    for path in (folder / name for name in OWN_FILES):
        if path.is_dir():
            raise UserError(f"{path} is a folder, and the run writes a file of that name: move it, or name another "
                            "--save_dir")
    for name, usual in (("tokenizer", os.path.isdir), ("run.log", os.path.isfile)):
        # Through a link another's files would be written to.
        if os.path.lexists(path := folder / name) and (path.is_symlink() or not usual(path)):
            raise UserError(f"{path} is not what runs write there: move it, or name another --save_dir")
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            # A power cut may take back a folder that is new, with all that was made sure of in it.
            fsync(path.parent)
        probe = folder / f".probe_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --save_dir {folder}: {error.strerror}") from None


def read_data(program: str, run: RunConfig, tokenizer: Tokenizer, *,
              progress: bool) -> tuple[list[Mixture], Mixture | None, list[str]]:
    """As open_data, and what the start of a run says of the data."""
    stores, held_out = open_data(KINDS[program], run, tokenizer, progress=progress)
    notes = template_notes(tokenizer.name, tokenizer.own_template) if program == "sft" else []
    notes += data_notes(stores[0].stats, run.text_markers) + sources.notes(stores, held_out)
    return stores, held_out, notes + passed_over(run.data_path)


def open_data(kind: str, run: RunConfig, tokenizer: Tokenizer, *, progress: bool = False,
              build_it: bool = True) -> tuple[list[Mixture], Mixture | None]:
    """The training samples of each epoch, and the held-out ones or None.

    Epochs share one set unless a share or an option draws anew each epoch.  build_it: as open_or_build's.
    """
    if run.too_long not in POLICIES[kind]:
        raise UserError(f"{run.place('too_long')} is {run.too_long}: a conversation's turns belong together; choose "
                        f"from {', '.join(POLICIES[kind])}")
    sources, held_sources = expand(run.data_path), expand(run.eval_path) if run.eval_path else []

    def opened(sources: list[Source], options: dict) -> list[TokenStore]:
        return [open_or_build(source.path, tokenizer, kind=kind, max_seq_len=run.max_seq_len, policy=run.too_long,
                              on_bad_record=run.on_bad_record, cache_dir=run.cache_dir, workers=run.num_workers,
                              options=options, progress=progress, build_it=build_it)
                for source in sources]

    fixed = dict(learn=run.learn, text_markers=run.text_markers)
    drawn = run.random_system_ratio > 0 or run.drop_empty_think_ratio > 0
    options = dict(random_system_ratio=run.random_system_ratio, drop_empty_think_ratio=run.drop_empty_think_ratio,
                   seed=run.seed)
    of_epochs = [opened(sources, {**fixed, **options, "epoch": epoch} if drawn else fixed)
                 for epoch in range(run.epochs_begun if drawn else 1)]
    held_stores = opened(held_sources, fixed)
    if run.eval_fraction and not held_sources:
        split = [[store.split(run.eval_fraction, run.seed) for store in stores] for stores in of_epochs]
        of_epochs = [[train for train, _ in stores] for stores in split]
        held_sources, held_stores = sources, [held for _, held in split[0]]
    held_out = None
    if held_sources:
        held_out = mix([replace(source, share=1.0) for source in held_sources], held_stores, run.seed, 0)
    once = len(of_epochs) == 1 and whole_passes(sources)
    epochs = [mix(sources, of_epochs[min(epoch, len(of_epochs) - 1)], run.seed, epoch)
              for epoch in range(1 if once else run.epochs_begun)]
    return epochs * run.epochs_begun if once else epochs, held_out


def split_by_source(held_out: Mixture | None, run: RunConfig, ranks: int) -> tuple[EvalSet, ...]:
    return tuple(EvalSet(name, part, plan_epoch(part, run, ranks, 0)) for name, part in
                 (held_out.parts() if held_out else ()))


def plan_epoch(store: Mixture, run: RunConfig, ranks: int, epoch: int) -> loader.EpochPlan:
    return loader.epoch_plan(store.lengths, store.labelled, pack_len=run.row_len,
                             rows_per_step=run.batch_size * run.accumulation_steps * ranks, seed=run.seed,
                             epoch=epoch, packing=run.packing)
