"""Every setting of a DeepSpeed JSON takes effect, is said to have none, or is refused in one line."""

import json

import pytest
import yaml

from minimind_ds.config import deepspeed_json
from minimind_ds.config.deepspeed_check import check_packages
from minimind_ds.config.deepspeed_keys import KEYS, REFUSED
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS
from minimind_ds.config.run import parse_run_config
from tests.config import key_table
from tests.config.try_configs import prepared_with

ADAMW = {"type": "AdamW", "params": {}}


def run_of(path, *flags):
    run = parse_run_config(["--deepspeed", str(path), "--preset", "debug", *flags], "sft", {})
    return run if run.dtype else run.replace(dtype="fp32")


def resolved(tmp_path, config, *flags):
    """(configuration, run, notes) of a file's text or content."""
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    run = run_of(path, *flags)
    raw = deepspeed_json.read(run)
    ds, run = deepspeed_json.resolve(raw, run, PRESETS["debug"], ranks=2, total_steps=200)
    # The second time, with the numbers that the file owns, as prepare does.
    again, same = deepspeed_json.resolve(raw, run, PRESETS["debug"], ranks=2, total_steps=200)
    assert again == ds and same.to_yaml() == run.to_yaml()
    check_packages(run.deepspeed, ds)
    return ds, run, deepspeed_json.notes(raw, run)


def refusal(tmp_path, config, *flags) -> str:
    with pytest.raises(UserError) as error:
        resolved(tmp_path, config, *flags)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700 + len(str(tmp_path))
    return str(error.value)


def optimizer(kind, **params):
    return {"optimizer": {"type": kind, "params": params}}


def scheduler(kind, **params):
    return {"scheduler": {"type": kind, "params": params}}


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ADAMW_ONE_CYCLE = {**optimizer("AdamW", lr=1e-3),
                   **scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-2, cycle_first_step_size=2)}
MUON = optimizer("Muon", lr="auto", muon_lr=0.02, adam_lr=3e-4)


def test_what_an_optimizer_block_leaves_out_comes_from_the_flags(tmp_path):
    ds, run, _ = resolved(tmp_path, optimizer("AdamW", lr="auto"), "--weight_decay", "0.3", "--adam_beta2", "0.5",
                          "--adam_epsilon", "1e-6")
    assert ds["optimizer"]["params"] == {"lr": 5e-4, "weight_decay": 0.3, "betas": [0.9, 0.5], "eps": 1e-6}
    assert (run.weight_decay, run.adam_beta2) == (0.3, 0.5)


def test_a_flag_that_the_optimizer_has_no_place_for_is_an_error_and_run_yaml_leaves_it_out(tmp_path):
    said = refusal(tmp_path, optimizer("SGD"), "--adam_beta1", "0.8")
    assert "--adam_beta1" in said and "ds.json" in said and "SGD has no betas" in said
    _, run, _ = resolved(tmp_path, optimizer("SGD"))
    assert not {"adam_beta1", "adam_beta2", "adam_epsilon"} & set(yaml.safe_load(run.to_yaml()))


@pytest.mark.parametrize("kind, params, flags", [
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}, ("--learning_rate", "1e-3")),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}, ("--adam_beta1", "0.8")),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}, ("--warmup_ratio", "0.1")),
    ("LRRangeTest", {}, ("--learning_rate", "1e-3")),
    ("WarmupLR", {}, ("--min_lr_ratio", "0.5")),
    ("WarmupDecayLR", {}, ("--min_lr_ratio", "0.5")),
    ("WarmupDecayLR", {"warmup_num_steps": 10}, ("--warmup_ratio", "0.1")),
    ("WarmupCosineLR", {"cos_min_ratio": 0.2}, ("--min_lr_ratio", "0.5")),
    ("WarmupLR", {"warmup_max_lr": 1e-2}, ("--learning_rate", "1e-3")),
    ("WarmupCosineLR", {"warmup_num_steps": 10}, ("--warmup_steps", "10")),
    ("WarmupLR", {}, ("--lr_schedule", "linear")),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}, ("--decay_ratio", "0.1")),
])
def test_a_flag_that_the_scheduler_makes_meaningless_is_an_error_that_names_both(tmp_path, kind, params, flags):
    said = refusal(tmp_path, {**optimizer("AdamW", lr="auto"), **scheduler(kind, **params)}, *flags)
    assert flags[0] in said and "ds.json" in said


def test_a_flag_that_agrees_with_the_file_is_no_less_meaningless(tmp_path):
    config = {**ADAMW_ONE_CYCLE, **optimizer("AdamW", lr=1e-3, betas=[0.8, 0.95])}
    for flag, value in (("--learning_rate", "1e-3"), ("--adam_beta2", "0.95")):
        assert flag in refusal(tmp_path, config, flag, value)
    _, _, notes = resolved(tmp_path, config)
    for key in ("lr", "betas"):
        assert any(f"optimizer.params.{key} has no effect" in note for note in notes)


def test_what_a_scheduler_block_leaves_out_comes_from_the_flags(tmp_path):
    for kind in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        flags = ("--min_lr_ratio", "0.2") if kind == "WarmupCosineLR" else ()
        ds, run, _ = resolved(tmp_path, scheduler(kind), "--learning_rate", "2e-3", "--warmup_ratio", "0.1", *flags)
        params = ds["scheduler"]["params"]
        assert params["warmup_num_steps"] == 20 and params.get("total_num_steps", 200) == 200
        assert params.get("warmup_max_lr", 2e-3) == 2e-3 and params.get("cos_min_ratio", 0.2) == 0.2
        assert yaml.safe_load(run.to_yaml())["warmup_ratio"] == 0.1
        ds, run, _ = resolved(tmp_path, scheduler(kind), "--warmup_steps", "30")
        assert ds["scheduler"]["params"]["warmup_num_steps"] == 30 and "lr_schedule" not in run.to_yaml()


def test_run_yaml_reads_back_beside_the_same_file(tmp_path):
    for i, config in enumerate([ADAMW_ONE_CYCLE, optimizer("SGD", lr=1e-2), scheduler("WarmupLR"), MUON,
                                optimizer("Lion", betas=[0.9, 0.99]) | OFFLOAD, {"zero_optimization": {"stage": 1}}]):
        _, run, _ = resolved(tmp_path, config)
        again = tmp_path / f"{i}.yaml"
        again.write_text(run.to_yaml(), encoding="utf-8")
        read = parse_run_config(["--config", str(again)], "sft", {})
        _, same = deepspeed_json.resolve(deepspeed_json.read(read), read, PRESETS["debug"], ranks=2, total_steps=200)
        assert same.to_yaml() == run.to_yaml()


def test_muons_own_rates_need_no_flag_and_no_scheduler_that_sets_one_rate_for_all(tmp_path):
    ds, run, _ = resolved(tmp_path, MUON)
    assert ds["optimizer"]["params"]["muon_lr"] == 0.02 and "learning_rate" not in yaml.safe_load(run.to_yaml())
    assert "muon_lr" in refusal(tmp_path, MUON, "--learning_rate", "1e-3")
    for kind in ("WarmupDecayLR", "OneCycle"):
        params = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2} if kind == "OneCycle" else {}
        said = refusal(tmp_path, {**MUON, **scheduler(kind, **params)})
        assert kind in said and "muon_lr" in said
    resolved(tmp_path, {**MUON, **scheduler("WarmupCosineLR")})


REFUSALS = {
    "a removed optimizer": (optimizer("OneBitAdam", freeze_step=100), "removed its 1-bit optimizers"),
    "another removed one": (optimizer("ZeroOneAdam"), "removed its 1-bit optimizers"),
    "an unknown optimizer": (optimizer("adamw_8bit"), "optimizer.type is 'adamw_8bit'"),
    "a function of torch.optim": (optimizer("lr_scheduler"), "optimizer.type is 'lr_scheduler'"),
    "an optimizer with a closure": (optimizer("LBFGS"), "several times a step"),
    "Lamb in parts": ({**optimizer("Lamb"), "zero_optimization": {"stage": 2}}, "needs whole matrices"),
    "Lion without a GPU": (optimizer("Lion"), "no optimizer lion for this machine's processor"),
    "an unknown parameter": (optimizer("AdamW", weigth_decay=0.1), "params.weigth_decay; did you mean 'weight_decay'"),
    "one Muon would drop": (optimizer("Muon", nesterov=True), "params.nesterov"),
    "one of torch's only": (optimizer("AdamW", maximize=True), "params.maximize"),
    "clipping in the optimizer": (optimizer("AdamW", max_grad_norm=1.0), "gradient_clipping at the top"),
    "betas out of range": (optimizer("AdamW", betas=[5, 0.9]), "betas[0]"),
    "one beta": (optimizer("AdamW", betas=[0.9]), "must be two numbers"),
    "a negative decay": (optimizer("AdamW", weight_decay=-1), "weight_decay"),
    "an epsilon that is text": (optimizer("AdamW", eps="x"), "optimizer.params.eps is 'x'"),
    "a momentum that is text": (optimizer("SGD", momentum="x"), "optimizer.params.momentum is 'x'"),
    "an infinite rate": ('{"optimizer": {"type": "AdamW", "params": {"lr": 1e400}}}', "lr is inf; it must be"),
    "no number for a rate": ('{"optimizer": {"type": "AdamW", "params": {"lr": NaN}}}', "lr is nan"),
    "params that are a list": ({"optimizer": {"type": "AdamW", "params": []}}, "optimizer.params is []"),
    "amsgrad in DeepSpeed's Adam": (optimizer("AdamW", amsgrad=True), "torch_adam true does"),
    "what torch refuses": (optimizer("SGD", nesterov=True), "Nesterov momentum requires a momentum"),
    "Muon, clipped in parts": ({**optimizer("Muon"), "zero_optimization": {"stage": 1}}, "--grad_clip 0"),
    "Muon, clipped by the file": ({**optimizer("Muon"), "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}},
                                  "; gradient_clipping 0, or stage 0"),
    "Adagrad's checkpoints at stage 3": ({**optimizer("Adagrad"), "zero_optimization": {"stage": 3}},
                                         "--save_interval 0"),
    "no scheduler's type": ({"scheduler": {"params": {}}}, "scheduler has no type"),
    "an unknown scheduler": (scheduler("Foo"), "choose from OneCycle"),
    "a scheduler's typo": (scheduler("WarmupLR", warmup_steps=3), "unknown key scheduler.params.warmup_steps"),
    "a scheduler's text": (scheduler("WarmupLR", warmup_num_steps="abc"), "'abc'; it must be a number"),
    "a scheduler's null": ({"scheduler": {"type": "WarmupLR", "params": None}}, "scheduler.params is None"),
    "a scheduler's gap": (scheduler("OneCycle", cycle_min_lr=0.1), "OneCycle needs params.cycle_max_lr"),
    "a negative rate": (scheduler("OneCycle", cycle_min_lr=-1.0, cycle_max_lr=-0.5), "the rate becomes"),
    "torch's scheduler over ZeRO": ({**scheduler("CosineAnnealingLR", T_max=9), "zero_optimization": {"stage": 2}},
                                    "at stage 0 in fp32 only"),
    "summed gradients": ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum'"),
    "scaled before a scatter": ({"prescale_gradients": True, "zero_optimization": {"stage": 2}}, "reduce_scatter"),
    "divided before, at stage 3": ({"gradient_predivide_factor": 2.0,
                                    "zero_optimization": {"stage": 3, "reduce_scatter": False}}, "at stage 3"),
    "divided by nothing": ({"gradient_predivide_factor": 0}, "must be above 0"),
    "ZenFlow": ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
    "superoffload": ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "super_offload"),
    "masters in 16 bits": ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "fp32 masters"),
    "a norm nobody takes": ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm"),
    "a tag's check": ({"checkpoint": {"tag_validation": "FOO"}}, "checkpoint.tag_validation is 'FOO'"),
    "a universal checkpoint": ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
    "checkpoints of each node": ({"checkpoint": {"use_node_local_storage": True}}, "use_node_local_storage"),
    "a monitor's typo": ({"tensorboard": {"enabled": True, "outputpath": "x"}}, "did you mean 'output_path'"),
    "steps that are text": ({"steps_per_print": "10"},
                            "steps_per_print is '10'; it must be a positive whole number or Infinity"),
    "no steps": ({"steps_per_print": 0}, "steps_per_print is 0"),
    "a level nobody knows": ({"log_level": "loud"}, "log_level is 'loud'"),
    "a type nobody knows": ({"data_types": {"grad_accum_dtype": "foo"}}, "data_types.grad_accum_dtype is 'foo'"),
    "two precisions": ({"data_types": {"param_dtype": "bf16"}}, "the run's precision is fp32"),
    "a communication type": ({"communication_data_type": 5}, "communication_data_type is 5"),
    "compile's typo": ({"compile": {"foo": 1}}, "unknown key compile.foo"),
    "a profiler's text": ({"flops_profiler": {"enabled": "x"}}, "flops_profiler.enabled is 'x'"),
    "a logger's number": ({"comms_logger": {"enabled": True, "prof_ops": 5}}, "comms_logger.prof_ops is 5"),
    "a timer's text": ({"timers": {"throughput": {"enabled": "x"}}}, "timers.throughput.enabled"),
    "aio's text": ({"aio": {"block_size": "x"}}, "aio.block_size is 'x'"),
    "activations' text": ({"activation_checkpointing": {"profile": "x"}}, "activation_checkpointing.profile is 'x'"),
    "a pipeline's text": ({"checkpoint": {"tag_validation": 3}}, "checkpoint.tag_validation is 3"),
    "a stage that is true": ({"zero_optimization": {"stage": True}}, "must be 0, 1, 2 or 3"),
    "a stage that is text": ({"zero_optimization": {"stage": "2"}}, "must be 0, 1, 2 or 3"),
    "a device that is none": ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "tape"}}}, "'tape'"),
    "an offload that is text": ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "must be an object"),
    "an empty bucket": ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "reduce_bucket_size is 0"),
    "an odd bucket": ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 5}}, "even number"),
    "a loss scale that is text": ({"fp16": {"enabled": False, "loss_scale": "x"}}, "fp16.loss_scale is 'x'"),
    "endless accumulation": ('{"gradient_accumulation_steps": 1e400}', "gradient_accumulation_steps is inf"),
    "a clip that is none": ('{"gradient_clipping": NaN}', "gradient_clipping is nan"),
    "a negative clip": ({"gradient_clipping": -1}, "at least 0"),
    "a huge batch": ({"train_batch_size": 10**300}, "it must be a positive whole number"),
    "too many digits": ('{"train_batch_size": ' + "9" * 5000 + "}", "digits"),
    "too many levels": ('{"zero_optimization": ' + "[" * 400 + "]" * 400 + "}", "nested too deeply"),
    "far too many levels": ('{"zero_optimization": ' + "[" * 100000, "nested too deeply"),
    "too many bytes": ('{"_comment": "' + "x" * 300000 + '"}', "larger than 256 KiB"),
    "a key twice": ('{"gradient_clipping": 1, "gradient_clipping": 2}', "appears twice"),
    "a key twice, with comments": ('{"bf16": {}, // one\n"bf16": {}}', "appears twice"),
    "tensor parallelism, and odd keys": ({"_comment": "mine", "strange": 1, "tensor_parallel": {"autotp_size": 2}},
                                         "'tensor_parallel' is not supported"),
    "sparse gradients": ({"sparse_gradients": True}, "DeepSpeed has removed it"),
    "a one for true": ({"bf16": {"enabled": 1}}, "bf16.enabled is 1; it must be true"),
    "a null for false": ({"fp16": {"enabled": None}}, "fp16.enabled is None"),
    "a path of keys for a block": ({"checkpoint.tag_validation": "fail"}, "'checkpoint.tag_validation' has a dot"),
    "another": ({"zero_optimization": {"offload_param.device": "cpu"}}, "'offload_param.device' has a dot"),
    "a key of two lines": ('{"gradient\\nclipping": 1}', r"key 'gradient\nclipping' is no text on one line"),
    "a letter of another script": ({"gr\u0430dient_clipping": 1}, "did you mean 'gradient_clipping'"),
    "a blank in a key": ({"fp16 ": {}}, "unknown key 'fp16 '; did you mean 'fp16'"),
    "a NUL": ({"csv_monitor": {"output_path": "a\0"}}, "csv_monitor.output_path is 'a\\x00', which is no text"),
    "half a character": ('{"tensorboard": {"job_name": "\\ud800"}}', "tensorboard.job_name"),
    "nothing": ("", "is empty"),
    "a YAML": ("zero_optimization:\n  stage: 2\n", "zero_optimization is 'stage: 2'"),
    "partitions of no rank": ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}, "at least 1"),
    "a number beyond all": (optimizer("AdamW", lr=1e30), "lr is 1e+30; it must be a number below 2^63"),
    "rows beyond all": ({"gradient_accumulation_steps": 10**12}, "more than 16,777,216 rows"),
    "tokens beyond all": ({"train_micro_batch_size_per_gpu": 10**12}, "no device holds more than 67,108,864 tokens"),
    "half a row": ({"train_batch_size": 16.5}, "train_batch_size is 16.5; it must be a positive whole number"),
    "a beta that is auto": (optimizer("AdamW", betas=["auto", 0.9]), "optimizer.params.betas[0] is 'auto'"),
    "torch's flag as text": (optimizer("SGD", foreach="yes"), "optimizer.params.foreach is 'yes'; it must be true"),
    "two that do not go together": (optimizer("SGD", momentum=0.9, nesterov=True, dampening=0.5),
                                    "params.nesterov is True and optimizer.params.dampening is 0.5: Nesterov"),
    "a cycle of text": (scheduler("OneCycle", cycle_min_lr="x", cycle_max_lr=1e-3), "cycle_min_lr is 'x'; it must be"),
    "a rate that falls for ever": (scheduler("LRRangeTest", lr_range_test_step_size=1, lr_range_test_step_rate=-1.0),
                                   "lr_range_test_step_rate is -1.0: the rate becomes"),
    "a division by zero in the run's midst": (
        scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=2, decay_step_size=1,
                  decay_lr_rate=-1), "scheduler.params.decay_lr_rate is -1: float division by zero"),
    "a momentum above one": (scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_max_mom=5),
                             "cycle_max_mom is 5: betas become"),
    "a warm-up nobody has": (scheduler("WarmupLR", warmup_type="cosine"), "must be \"log\" or \"linear\""),
    "a schedule that ends before the run": (scheduler("OneCycleLR", max_lr=1e-3, total_steps=20), "Tried to step 21"),
    "checkpoints for other ranks": ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, "--from_resume"),
    "a resume that loses bits": ({"zero_optimization": {"load_from_fp32_weights": False}}, "load_from_fp32_weights"),
    "an old stage 1": ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "legacy_stage1"),
    "an untested optimizer": ({"zero_allow_untested_optimizer": False, "zero_optimization": {"stage": 1},
                               **optimizer("SGD")}, "has not tested ZeRO with the optimizer SGD"),
    "a type in capitals": ({"data_types": {"buffer_dtype": "BF16"}}, "is 'BF16'; DeepSpeed wants 'bf16'"),
    "a pattern that is none": ({"data_types": {"keep_in_fp32_modules": ["("]}}, "must be a list of patterns"),
    "a folder in a file": ({"csv_monitor": {"enabled": True, "output_path": "/etc/passwd/x"}}, "cannot be written"),
    "a report that is a folder": ({"flops_profiler": {"enabled": True, "output_file": "/"}}, "cannot be written"),
    "an offload that is not used, misspelt": ({"zero_optimization": {"offload_param": {"devise": "cpu"}}},
                                              "offload_param.devise; did you mean 'device'"),
    "experts, misspelt": ({"expert_parallel": {"enabeld": True}}, "expert_parallel.enabeld; did you mean 'enabled'"),
    "experts by text": ({"expert_parallel": {"enabled": "true"}}, "expert_parallel.enabled is 'true'"),
    "compile by text": ({"compile": {"enabled": "yes"}}, "compile.enabled is 'yes'; it must be true or false"),
    "compression that is on": ({"compression_training": {"sparse_pruning": {"shared_parameters": {"enabled": True}}}},
                               "'compression_training'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_deepspeed_would_refuse_or_get_wrong_is_refused_in_one_line(tmp_path, name):
    config, words = REFUSALS[name]
    said = refusal(tmp_path, config)
    assert said.isprintable()
    assert words in said and "ds.json" in said, said


ACCEPTED = {
    "blocks that are off": {"hybrid_engine": {"enabled": False}, "elasticity": {"enabled": False},
                            "amp": {"enabled": False}, "data_efficiency": {"enabled": False},
                            "nebula": {"enabled": False},
                            "torch_autocast": {"enabled": False}, "tensor_parallel": {"autotp_size": 1},
                            "sparse_gradients": False, "curriculum_learning": {"enabled": False},
                            "compression_training": {"a": {"shared_parameters": {"enabled": False}}}},
    "auto where DeepSpeed falls back": {"zero_optimization": {
        "stage": 3, "stage3_max_live_parameters": "auto", "stage3_max_reuse_distance": "auto", "overlap_comm": "auto",
        "sub_group_size": "auto", "offload_param": {"device": "auto", "pin_memory": "auto"}},
        "wall_clock_breakdown": "auto", "steps_per_print": "auto", "fp16": {"enabled": "auto", "loss_scale": "auto"}},
    "a scheduler's auto": scheduler("WarmupLR", warmup_type="auto", warmup_min_lr="auto"),
    "an optimizer's auto": optimizer("SGD", momentum="auto", lr="auto"),
    "comments": '{\n// mine\n"bf16": {"enabled": false}, # off\n"_note": 1, "//": 2, "gradient_clipping": 1.0,\n}',
    "a byte order mark": '\ufeff{"gradient_clipping": 1.0}',
    "an old form": {"zero_optimization": True},
    "leftovers": {"cuda_visible_devices": 0, "monitor_config": {"enabled": True}, "vocabulary_size": 30522},
    "gradients not contiguous": {"zero_optimization": {"stage": 2, "contiguous_gradients": False}},
    "names without stage3_": {"zero_optimization": {"stage": 3, "max_live_parameters": 0,
                                                    "gather_16bit_weights_on_model_save": True}},
    "an old compile block": {"compile": {"disable": False, "backend": "inductor"}},
    "compile as the flag says": {"compile": {"enabled": "auto"}},
    "torch's scheduler": scheduler("CosineAnnealingLR", T_max=9),
    "scaled before a plain reduction": {"prescale_gradients": True},
    "DeepSpeed's own logs": {"comms_logger": {"enabled": True, "verbose": True}, "memory_breakdown": True,
                             "flops_profiler": {"enabled": True, "profile_step": 1}, "dump_state": True},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_deepspeed_accepts_is_not_refused_without_need(tmp_path, name):
    ds, _, _ = resolved(tmp_path, ACCEPTED[name])
    assert "auto" not in json.dumps(ds) and "_note" not in ds
    assert ds["train_micro_batch_size_per_gpu"] == 1


@pytest.mark.parametrize("config, flags, dtype", [
    ({"bf16": {"enabled": False}}, (), "fp32"), ({"fp16": {"enabled": False}}, (), "fp32"), ({"bf16": {}}, (), "fp32"),
    ({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}, (), "fp32"), ({}, ("--dtype", "bf16"), "bf16"),
    ({"bf16": {"enabled": "auto"}}, ("--dtype", "bf16"), "bf16"), ({"bfloat16": {"enabled": True}}, (), "bf16"),
    ({"fp16": {"enabled": False}, "bf16": {"enabled": "auto"}}, ("--dtype", "bf16"), "bf16"),
])
def test_a_precision_that_is_off_alone_means_fp32_and_no_block_leaves_it_to_the_flag(tmp_path, config, flags, dtype):
    ds, run, notes = resolved(tmp_path, config, *flags)
    assert run.dtype == dtype and ds["bf16"]["enabled"] == (dtype == "bf16") and not ds["fp16"]["enabled"]
    assert any("names no precision" in note for note in notes) == (not config)


SILENT = {"activation_checkpointing": {"partition_activations": True}, "compile": {"deepcompile": True},
          "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}, "autotuning": {"enabled": True},
          "disable_allgather": True, "cuda_visible_devices": "0", "sparse_gradients": False}


def test_each_setting_without_effect_says_so_once(tmp_path):
    ds, _, notes = resolved(tmp_path, SILENT)
    for key in SILENT:
        assert len([note for note in notes if f" {key} " in note or f" {key}." in note]) == 1, (key, notes)
    assert any("--gradient_checkpointing" in note for note in notes)
    assert not set(ds) & {"activation_checkpointing", "autotuning", "disable_allgather", "sparse_gradients"}
    off = {"activation_checkpointing": {"partition_activations": False}, "compile": {"deepcompile": False},
           "autotuning": {"enabled": False, "fast": True}, "bf16": {"enabled": "auto"}}
    assert resolved(tmp_path, off)[2] == []


def test_a_monitor_without_its_package_or_key_is_refused(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "COMET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for key, package in (("wandb", "wandb"), ("comet", "comet_ml"), ("tensorboard", "tensorboard")):
        check_packages("ds.json", {key: {"enabled": False}})
        with pytest.raises(UserError, match=f"ds.json: {key}.enabled needs the package {package}"):
            check_packages("ds.json", {key: {"enabled": True}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for key in ("wandb", "comet"):
        with pytest.raises(UserError, match=f"{key}.enabled needs a key"):
            check_packages("ds.json", {key: {"enabled": True}})
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_packages("ds.json", {"wandb": {"enabled": True}})


def test_the_bare_name_of_a_shipped_file_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert deepspeed_json.read(run_of("zero2"))["zero_optimization"]["stage"] == 2
    (tmp_path / "zero2").write_text('{"zero_optimization": {"stage": 1}}')
    assert deepspeed_json.read(run_of("zero2"))["zero_optimization"]["stage"] == 1


def test_a_yamls_path_begins_at_the_yaml_and_a_block_stands_for_a_file(tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "mine.json").write_text('{"gradient_clipping": 0.25}')
    (folder / "a.yaml").write_text("deepspeed: mine.json\n")
    (folder / "b.yaml").write_text("deepspeed: {gradient_clipping: 0.25, zero_optimization: {stage: 1}}\n")
    (folder / "c.yaml").write_text("deepspeed: {gradient_cliping: 0.25}\n")
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        run = parse_run_config(["--config", f"runs/{name}.yaml", "--preset", "debug", "--dtype", "fp32"], "sft", {})
        ds, run = deepspeed_json.resolve(deepspeed_json.read(run), run, PRESETS["debug"], ranks=1, total_steps=9)
        assert ds["gradient_clipping"] == 0.25
        (tmp_path / "again.yaml").write_text(run.to_yaml())
        again = parse_run_config(["--config", "again.yaml"], "sft", {})
        assert deepspeed_json.read(again)["gradient_clipping"] == 0.25
    run = parse_run_config(["--config", "runs/c.yaml", "--dtype", "fp32"], "sft", {})
    with pytest.raises(UserError, match="deepspeed in runs/c.yaml: unknown key 'gradient_cliping'"):
        deepspeed_json.resolve(deepspeed_json.read(run), run, PRESETS["debug"], ranks=1, total_steps=9)


def test_prepare_says_at_the_start_what_has_no_effect(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"activation_checkpointing": {"profile": True}}))
    prepared = prepared_with(tmp_path / "ds.json", tmp_path)
    assert any("activation_checkpointing has no effect" in note for note in prepared.notes)


def test_the_readmes_table_is_what_the_code_does():
    assert key_table.in_readme() == key_table.table(), "python -m tests.config.key_table writes it anew"


@pytest.mark.parametrize("key", [key for key, known in KEYS.items() if known.what == REFUSED])
def test_every_key_that_the_table_calls_refused_is_refused(tmp_path, key):
    value = {"tensor_parallel": {"autotp_size": 2}}.get(key, {"enabled": True})
    config = value if KEYS[key].kind is not bool else True
    for part in reversed(key.split(".")):
        config = {part: config}
    assert key in refusal(tmp_path, config)
