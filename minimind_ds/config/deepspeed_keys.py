"""What this trainer does with every key of a DeepSpeed JSON; ds_configs/README.md's table is made from these.

    python -m tests.config.key_table
"""

from __future__ import annotations

import difflib
import importlib
from typing import NamedTuple

from minimind_ds.config.errors import UserError

PASSED_ON = "passed on"
FILLED = "shared with a flag"
OURS = "carried out here"
NO_EFFECT = "no effect, said once"
REFUSED = "refused unless switched off"

# Types of values where DeepSpeed has no schema; a tuple lists the values.
POSITIVE, WHOLE, NUMBER = "a positive whole number", "a whole number, 0 or more", "a number"
# Accelerate writes Infinity for never.
STEPS = "a positive whole number or Infinity"
# No setting is larger; infinity and NaN are not below it.
LARGEST = 2**63
DTYPE_NAMES = ("fp32", "fp16", "bf16", None)
# DeepSpeed's names in data_types -> those of --dtype.
PRECISION_OF = {"fp32": "fp32", "float32": "fp32", "float": "fp32", "torch.float32": "fp32",
                "fp16": "fp16", "float16": "fp16", "half": "fp16", "torch.float16": "fp16",
                "bf16": "bf16", "bfloat16": "bf16", "torch.bfloat16": "bf16"}


class Key(NamedTuple):
    """what: one of the five above.  kind: a type above, bool, str, dict, list or a tuple of values; None: DeepSpeed's
    own schema tells.  why: for users, beside the key."""

    what: str
    kind: object = None
    why: str = ""


OLD = "DeepSpeed has removed it"
PLAN = "the plan of an epoch is fixed by data, seed and rows per step"
MASTERS = "checkpoints and exports hold fp32 masters"

# Top-level keys, and inner ones (with dots) where DeepSpeed has no schema or this trainer differs from it.
KEYS = {
    "train_batch_size": Key(FILLED, POSITIVE, "--batch_size × --accumulation_steps × ranks"),
    "train_micro_batch_size_per_gpu": Key(FILLED, POSITIVE, "--batch_size"),
    "gradient_accumulation_steps": Key(FILLED, POSITIVE, "--accumulation_steps"),
    "gradient_clipping": Key(FILLED, NUMBER, "--grad_clip"),
    "optimizer": Key(FILLED, dict, "what it leaves out comes from --learning_rate, --weight_decay, --adam_beta1, "
                                   "--adam_beta2, --adam_epsilon; without the block: AdamW"),
    "optimizer.type": Key(PASSED_ON, str, "adam, adamw, adagrad, lamb, lion, muon or a class of torch.optim"),
    "optimizer.params": Key(FILLED, dict, "the class's own arguments"),
    "optimizer.legacy_fusion": Key(PASSED_ON, bool),
    "scheduler": Key(FILLED, dict, "what it leaves out comes from --learning_rate, --warmup_ratio or "
                                   "--warmup_steps, --min_lr_ratio; without the block: --lr_schedule"),
    "scheduler.type": Key(PASSED_ON, str, "DeepSpeed's five; torch's at stage 0 in fp32"),
    "scheduler.params": Key(FILLED, dict, "the class's own arguments"),
    "fp16": Key(FILLED, dict, "--dtype"),
    "bf16": Key(FILLED, dict, "--dtype"),
    "bfloat16": Key(FILLED, dict, "the old name of bf16"),
    "fp16.fp16_master_weights_and_grads": Key(REFUSED, bool, MASTERS),
    "bf16.bf16_master_weights_and_grads": Key(REFUSED, bool, MASTERS),
    "bf16.bf16_optimizer_states": Key(REFUSED, bool, MASTERS),
    "fp16.auto_cast": Key(NO_EFFECT, bool, "the inputs are whole numbers"),
    "zero_optimization": Key(PASSED_ON, dict),
    "zero_optimization.zenflow": Key(REFUSED, dict, "its update of selected columns leaves the others' gradients to "
                                                    "later steps, so no step has one gradient"),
    "zero_optimization.offload_optimizer.super_offload": Key(REFUSED, bool, "its optimizer runs in a process of its "
                                                                            "own, where a NaN goes unseen"),
    "zero_optimization.leaf_module": Key(NO_EFFECT, dict, "every expert is in the graph of every step, so no module "
                                                          "has to be a leaf"),
    "zero_optimization.elastic_checkpoint": Key(REFUSED, bool, "a checkpoint here goes on at any stage and on any "
                                                               "ranks by itself: --from_resume"),
    "zero_optimization.legacy_stage1": Key(REFUSED, bool, OLD),
    "zero_optimization.mics_shard_size": Key(REFUSED, None, OLD),
    "zero_optimization.mics_hierarchical_params_gather": Key(REFUSED, bool, OLD),
    "zero_optimization.zeropp_loco_param": Key(REFUSED, None, OLD),
    "zero_allow_untested_optimizer": Key(PASSED_ON, bool, "true where the file does not say; false with another "
                                                          "optimizer than Adam, Adagrad, Lion, Muon is an error"),
    "zero_force_ds_cpu_optimizer": Key(NO_EFFECT, bool, "DeepSpeed makes the optimizer here, so it is its own"),
    "communication_data_type": Key(PASSED_ON, DTYPE_NAMES),
    "seq_parallel_communication_data_type": Key(NO_EFFECT, DTYPE_NAMES, "rows over ranks are this toolkit's own"),
    "prescale_gradients": Key(PASSED_ON, bool, "at stages 2 and 3 with reduce_scatter false only"),
    "gradient_predivide_factor": Key(PASSED_ON, NUMBER, "above 0; not at stage 3, at 2 with reduce_scatter false"),
    "gradient_allreduce_op": Key(PASSED_ON, ("mean",), "\"sum\" would multiply gradients by the ranks"),
    "disable_allgather": Key(NO_EFFECT, bool, "DeepSpeed reads it and does nothing"),
    "data_types": Key(PASSED_ON, dict),
    "data_types.grad_accum_dtype": Key(PASSED_ON, (*PRECISION_OF, None), "at stages 0 and 1 the run's precision only"),
    "data_types.param_dtype": Key(PASSED_ON, (*PRECISION_OF, None), "the run's precision only"),
    "data_types.buffer_dtype": Key(PASSED_ON, (*PRECISION_OF, None)),
    "data_types.keep_in_fp32_modules": Key(PASSED_ON, None),
    "sequence_parallel_size": Key(OURS, POSITIVE, "rows over ranks (Ulysses)"),
    "data_parallel_size": Key(OURS, POSITIVE, "must be ranks ÷ sequence_parallel_size"),
    "expert_parallel": Key(OURS, dict, "experts over ranks; enabled, autoep_size, preset_model"),
    "expert_parallel.enabled": Key(OURS, bool),
    "expert_parallel.autoep_size": Key(OURS, POSITIVE),
    "expert_parallel.preset_model": Key(OURS, ("qwen3_moe", None)),
    "use_data_before_expert_parallelism": Key(NO_EFFECT, bool, "experts lie on neighbouring ranks"),
    "steps_per_print": Key(PASSED_ON, STEPS, "never, where the file does not say"),
    "wall_clock_breakdown": Key(PASSED_ON, bool, "DeepSpeed's log is shown"),
    "memory_breakdown": Key(PASSED_ON, bool, "DeepSpeed's log is shown"),
    "dump_state": Key(PASSED_ON, bool, "DeepSpeed's log is shown"),
    "disable_python_gc": Key(PASSED_ON, bool),
    "log_level": Key(PASSED_ON, ("debug", "info", "warning", "error", "critical", None)),
    "timers": Key(PASSED_ON, dict),
    "timers.throughput": Key(PASSED_ON, dict),
    "flops_profiler": Key(PASSED_ON, dict),
    "flops_profiler.enabled": Key(PASSED_ON, bool),
    "flops_profiler.recompute_fwd_factor": Key(PASSED_ON, NUMBER),
    "flops_profiler.profile_step": Key(PASSED_ON, WHOLE),
    "flops_profiler.module_depth": Key(PASSED_ON, int),
    "flops_profiler.top_modules": Key(PASSED_ON, WHOLE),
    "flops_profiler.detailed": Key(PASSED_ON, bool),
    "flops_profiler.output_file": Key(PASSED_ON, (str, None)),
    "comms_logger": Key(PASSED_ON, dict, "DeepSpeed's log is shown"),
    "tensorboard": Key(PASSED_ON, dict, "beside --use_tensorboard; needs the package tensorboard"),
    "wandb": Key(PASSED_ON, dict, "beside --use_wandb; needs the package and a key, or WANDB_MODE=offline"),
    "csv_monitor": Key(PASSED_ON, dict),
    "comet": Key(PASSED_ON, dict, "needs the package comet_ml and a key"),
    "aio": Key(PASSED_ON, dict),
    **{f"aio.{name}": Key(PASSED_ON, POSITIVE) for name in ("block_size", "queue_depth", "intra_op_parallelism",
                                                            "thread_count")},
    **{f"aio.{name}": Key(PASSED_ON, bool) for name in ("single_submit", "overlap_events", "use_gds")},
    "checkpoint": Key(PASSED_ON, dict),
    "checkpoint.tag_validation": Key(PASSED_ON, ("ignore", "warn", "fail")),
    "checkpoint.load_universal": Key(REFUSED, bool, "a checkpoint here goes on at any stage and on any ranks by "
                                                    "itself: --from_resume"),
    "checkpoint.use_node_local_storage": Key(REFUSED, bool, "a checkpoint is one folder that all ranks see"),
    "checkpoint.parallel_write": Key(NO_EFFECT, dict, "there are no pipeline stages"),
    "checkpoint.parallel_write.pipeline_stage": Key(NO_EFFECT, bool),
    "checkpoint.writer": Key(NO_EFFECT, None, "files are written, hashed and renamed here"),
    "checkpoint.checkpoint_serialization": Key(NO_EFFECT, bool, "files are written, hashed and renamed here"),
    "activation_checkpointing": Key(NO_EFFECT, dict, "--gradient_checkpointing recomputes activations"),
    **{f"activation_checkpointing.{name}": Key(NO_EFFECT, bool) for name in (
        "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
        "synchronize_checkpoint_boundary", "profile")},
    "activation_checkpointing.number_checkpoints": Key(NO_EFFECT, (int, None)),
    "compile": Key(NO_EFFECT, dict, "DeepCompile is not started; --compile compiles the layers"),
    "compile.enabled": Key(FILLED, bool, "--compile; a key of old releases"),
    "compile.disable": Key(NO_EFFECT, bool, "a key of old releases; --compile compiles the layers"),
    "compile.backend": Key(NO_EFFECT, (str, None), "a key of old releases; --compile compiles the layers"),
    "compile.kwargs": Key(NO_EFFECT, (dict, None), "a key of old releases; --compile compiles the layers"),
    "dataloader_drop_last": Key(NO_EFFECT, bool, "an epoch's last step is filled up with empty rows"),
    # Parallelism first among what is refused: it is the reason even where other keys are odd.
    "tensor_parallel": Key(REFUSED, dict, "tensor parallelism does not pay at these sizes and is not built in"),
    "pipeline": Key(REFUSED, None, "the models here are not cut into pipeline stages"),
    "managed_gradient_accumulation": Key(REFUSED, bool, "the trainer decides where a step ends"),
    "hybrid_engine": Key(REFUSED, dict, "it serves reinforcement learning"),
    "autotuning": Key(NO_EFFECT, dict, "only the launcher's --autotuning starts it; launch/benchmark.py sweeps"),
    "data_efficiency": Key(REFUSED, dict, PLAN),
    "curriculum_learning": Key(REFUSED, dict, PLAN),
    "progressive_layer_drop": Key(REFUSED, dict, OLD),
    "weight_quantization": Key(REFUSED, dict, "weights are trained in full precision"),
    "quantize_training": Key(REFUSED, dict, OLD),
    "compression_training": Key(REFUSED, dict, f"{OLD}; weights are trained in full precision"),
    "elasticity": Key(REFUSED, dict, f"{OLD}; a checkpoint goes on with other ranks by itself"),
    "torch_autocast": Key(REFUSED, dict, "use bf16 or fp16"),
    "amp": Key(REFUSED, dict, f"{OLD}; use bf16 or fp16"),
    "sparse_gradients": Key(REFUSED, bool, f"{OLD}; gradients are dense"),
    "sparse_attention": Key(REFUSED, None, f"{OLD}; --kernels chooses the attention"),
    "eigenvalue": Key(REFUSED, dict, OLD),
    "nebula": Key(REFUSED, dict, OLD),
    "graph_harvesting": Key(REFUSED, bool, OLD),
    "datastates_ckpt": Key(REFUSED, dict, "files are written, hashed and renamed here"),
    # Leftovers that DeepSpeed reads no more, seen in published files.
    "cuda_visible_devices": Key(NO_EFFECT, None, "the launcher's --include chooses devices"),
    "vocabulary_size": Key(NO_EFFECT, None, "the tokenizer tells"),
    "fp32_allreduce": Key(NO_EFFECT, None, "communication_data_type has taken its place"),
    "allgather_size": Key(NO_EFFECT, None, "zero_optimization.allgather_bucket_size has taken its place"),
    "comms_config": Key(NO_EFFECT, None, "DeepSpeed knows no such key; comms_logger is one"),
    "monitor_config": Key(NO_EFFECT, None, "DeepSpeed knows no such key; tensorboard, wandb, csv_monitor stand at "
                                           "the top"),
}

# Blocks with a schema of DeepSpeed's own.
SCHEMAS = {
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": ("deepspeed.runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": ("deepspeed.runtime.zero.offload_config",
                                            "DeepSpeedZeroOffloadOptimizerConfig"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
    "tensorboard": ("deepspeed.monitor.config", "TensorBoardConfig"),
    "wandb": ("deepspeed.monitor.config", "WandbConfig"),
    "csv_monitor": ("deepspeed.monitor.config", "CSVConfig"),
    "comet": ("deepspeed.monitor.config", "CometConfig"),
    "compile": ("deepspeed.compile.config", "CompileConfig"),
    "timers.throughput": ("deepspeed.utils.config", "DeepSpeedThroughputTimerConfig"),
}
# Blocks whose keys are another's to tell: a class's arguments, or nobody's.
OPEN = ("optimizer.params", "scheduler.params", "checkpoint.writer", "compile.kwargs",
        "checkpoint.parallel_write")


def schema_of(block: str) -> type:
    """DeepSpeed's schema of a block; imports deepspeed (some seconds)."""
    module, name = SCHEMAS[block]
    return getattr(importlib.import_module(module), name)


def inner_keys(block: str) -> list[str]:
    """The keys that KEYS names inside a block."""
    return [path.rpartition(".")[2] for path in KEYS if path.rpartition(".")[0] == block]


def is_comment(key: str) -> bool:
    return key.startswith(("_", "//", "#"))


def show(value) -> str:
    """A value for a message, cut to a line's length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def brief(error: Exception) -> str:
    """Another's error for a message: one line of ordinary length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def limit(value) -> str:
    """What a message adds where a number is too large."""
    large = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) >= LARGEST
    return " below 2^63 in size" if large else ""


def near(name: str, known) -> list[str]:
    """The known name that another was probably meant to be, if any."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.75)


def unknown(path: str, key: str, known) -> UserError:
    """The error for an unknown key, with the nearest known one."""
    close = near(key.rpartition(".")[2], known)
    shown = show(key) if "." not in key else key[:80]
    return UserError(f"{path}: unknown key {shown}" + (f"; did you mean {close[0]!r}?" if close else ""))
