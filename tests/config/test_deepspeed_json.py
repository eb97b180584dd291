"""Law 6: one owner for each number; the DeepSpeed JSON may be any the user already has."""

import json

import pytest

from minimind_ds.checkpoint import reshape
from minimind_ds.config.deepspeed_json import own_settings, read_json, resolve
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS
from minimind_ds.config.run import parse_run_config
from minimind_ds.training.resume import layout_facts, refuse_changes
from tests.config.try_configs import prepared_with

MODEL = PRESETS["debug"]


def resolved(tmp_path, config, *flags, ranks=2):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    run = parse_run_config(["--deepspeed", str(path), "--preset", "debug", *flags], "sft", {})
    if run.dtype is None:
        run = run.replace(dtype="fp32")
    return resolve(read_json(str(path)), run, MODEL, ranks=ranks, total_steps=200)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_shipped_files_leave_every_shared_number_to_the_flags(name, request):
    path = request.config.rootpath / "ds_configs" / f"{name}.json"
    run = parse_run_config(["--deepspeed", str(path), "--preset", "debug", "--batch_size", "3", "--grad_clip", "0.5",
                            "--accumulation_steps", "4", "--learning_rate", "0.002", "--dtype", "bf16",
                            "--weight_decay", "0.2", "--adam_beta2", "0.95"], "sft", {})
    config, _ = resolve(read_json(str(path)), run, MODEL, ranks=2, total_steps=10)
    assert config["train_micro_batch_size_per_gpu"] == 3 and config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5 and config["bf16"]["enabled"] and not config["fp16"]["enabled"]
    params = config["optimizer"]["params"]
    assert (params["lr"], params["weight_decay"], params["betas"]) == (0.002, 0.2, [0.9, 0.95])
    assert "auto" not in json.dumps(config)


def test_hugging_face_files_full_of_auto_are_filled_in(tmp_path):
    # The file that transformers' own documentation gives for stage 3 with offload.
    config, run = resolved(tmp_path, {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
                 "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto",
                                                  "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                          "warmup_num_steps": "auto", "total_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
                              "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True,
                              "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
                              "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
                              "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
                              "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    }, "--dtype", "bf16", "--warmup_ratio", "0.1")
    zero, scheduler = config["zero_optimization"], config["scheduler"]["params"]
    assert "auto" not in json.dumps(config)
    assert zero["reduce_bucket_size"] == MODEL.hidden_size**2
    assert zero["stage3_param_persistence_threshold"] == 10 * MODEL.hidden_size
    assert scheduler["total_num_steps"] == 200 and scheduler["warmup_num_steps"] == 20
    assert scheduler["warmup_max_lr"] == run.learning_rate


@pytest.mark.parametrize("said, expected", [({}, False), ({"check_grad_overflow": True}, True),
                                            ({"check_grad_overflow": False}, False)])
def test_deepspeed_checks_every_gradient_where_the_json_says_so(tmp_path, said, expected):
    config, _ = resolved(tmp_path, {"bf16": {"enabled": True, **said}, "zero_optimization": {"stage": 2}})
    assert config["bf16"]["check_grad_overflow"] is expected


def test_a_number_only_the_json_gives_rules(tmp_path):
    config, run = resolved(tmp_path, {"gradient_clipping": 0.3, "train_micro_batch_size_per_gpu": 5,
                                      "gradient_accumulation_steps": 2, "bf16": {"enabled": True},
                                      "optimizer": {"type": "AdamW", "params": {"lr": 7e-4, "betas": [0.8, 0.9]}}})
    assert (run.grad_clip, run.batch_size, run.accumulation_steps, run.dtype) == (0.3, 5, 2, "bf16")
    assert (run.learning_rate, run.adam_beta1, run.adam_beta2) == (7e-4, 0.8, 0.9)
    assert config["gradient_clipping"] == 0.3


@pytest.mark.parametrize("config, flags", [
    ({"gradient_clipping": 0.3}, ("--grad_clip", "1.0")),
    ({"train_micro_batch_size_per_gpu": 4}, ("--batch_size", "2")),
    ({"gradient_accumulation_steps": 4}, ("--accumulation_steps", "2")),
    ({"bf16": {"enabled": True}}, ("--dtype", "fp32")),
    ({"fp16": {"enabled": True}}, ("--dtype", "bf16")),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, ("--learning_rate", "1e-3")),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, ("--adam_beta2", "0.999")),
    ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}, ("--weight_decay", "0.0")),
    ({"compile": {"enabled": False}}, ("--compile",)),
])
def test_json_and_flag_that_disagree_name_both_places(tmp_path, config, flags):
    with pytest.raises(ValueError) as error:
        resolved(tmp_path, config, *flags)
    assert "ds.json" in str(error.value) and flags[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_json_and_flag_may_agree(tmp_path):
    _, run = resolved(tmp_path, {"gradient_clipping": 0.3, "train_micro_batch_size_per_gpu": 4},
                      "--grad_clip", "0.3", "--batch_size", "4")
    assert run.grad_clip == 0.3 and run.batch_size == 4


@pytest.mark.parametrize("total, flags, expected", [
    (16, (), (8, 1)), (16, ("--batch_size", "2"), (2, 4)), (16, ("--accumulation_steps", "4"), (2, 4)),
])
def test_train_batch_size_decides_the_number_left_open(tmp_path, total, flags, expected):
    _, run = resolved(tmp_path, {"train_batch_size": total}, *flags)
    assert (run.batch_size, run.accumulation_steps) == expected


def test_train_batch_size_that_cannot_be_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is 7, but batch_size 2 × accumulation_steps 1 × 2 ranks is 4"):
        resolved(tmp_path, {"train_batch_size": 7}, "--batch_size", "2")


@pytest.mark.parametrize("config, expected", [
    ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'"),
    ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
    ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com; did you mean 'overlap_comm'"),
    ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage"),
    ({"zero_optimization": 2}, "zero_optimization is 2; it must be an object"),
    ({"bf16": {"enable": True}}, "unknown key bf16.enable; did you mean 'enabled'"),
    ({"optimizer": {"typ": "AdamW"}}, "unknown key optimizer.typ; did you mean 'type'"),
    ({"optimizer": {"params": {}}}, "optimizer has no type"),
    ({"pipeline": {}}, "'pipeline' is not supported"),
    ({"data_efficiency": {"enabled": True}}, "'data_efficiency' is not supported"),
    ({"gradient_clipping": "high"}, "gradient_clipping is 'high'; it must be a number"),
    ({"gradient_accumulation_steps": 1.5}, "must be a whole number"),
    ({"gradient_accumulation_steps": True}, "must be a number"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
    ({"communication_data_type": "auto"}, "\"auto\" at communication_data_type cannot be filled in"),
])
def test_what_is_wrong_in_the_json_is_named(tmp_path, config, expected):
    with pytest.raises(ValueError) as error:
        resolved(tmp_path, config)
    assert expected in str(error.value) and "ds.json" in str(error.value)


@pytest.mark.parametrize("text, expected", [
    ("{\"a\": 1,\n\"b\": }", "line 2: not valid JSON"),
    ("[1]", "holds one JSON object"),
    ("{\"fp16\": {}, \"fp16\": {}}", "key 'fp16' appears twice"),
])
def test_a_file_that_is_not_a_json_object_is_an_error(tmp_path, text, expected):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_json(str(path))


def test_a_resume_must_keep_what_the_files_optimizer_says_besides_the_flags(tmp_path):
    def settings(**config):
        return own_settings(resolved(tmp_path, config)[0], "cpu")

    def sgd(**params):
        return {"optimizer settings": settings(optimizer={"type": "SGD", "params": params})}

    assert sgd(momentum=0.0) == sgd()
    # How AdamW is computed is no setting of it.
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert settings() == settings(zero_optimization=offload) == settings(optimizer={"type": "AdamW", "params": {}})
    with pytest.raises(UserError, match="its optimizer settings is {'optimizer': {'momentum': 0.9}"):
        refuse_changes(sgd(momentum=0.9), sgd(momentum=0.5), "step_00000004")
    # Checkpoints of earlier releases do not say.
    refuse_changes({}, sgd(momentum=0.5), "step_00000004")
    with pytest.raises(UserError, match="rows per step is 2, this run's is 1 .*: raise --accumulation_steps on fewer"):
        refuse_changes({"rows per step": 2}, {"rows per step": 1}, "step_00000004")


def test_a_name_that_no_shipped_file_has_is_answered_with_theirs(tmp_path):
    with pytest.raises(UserError, match="No such file or directory; shipped ones are .*, zero0, zero1, zero2"):
        read_json("zero9")
    with pytest.raises(UserError, match="zero9.jsn: No such file or directory; shipped ones are "):
        read_json(str(tmp_path / "zero9.jsn"))


@pytest.mark.parametrize("stage, key, value", [(2, "round_robin_gradients", True), (3, "sub_group_size", 1000)])
def test_a_resume_must_keep_how_states_lie(tmp_path, stage, key, value):
    then, now = ({}, {})
    for facts, zero in ((then, {key: value}), (now, {})):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage, **zero}}))
        facts.update(layout_facts(prepared_with(tmp_path / "ds.json", tmp_path)))
    assert key not in reshape.MAY_DIFFER and then[key] == value
    with pytest.raises(UserError, match=f"its {key} is {value}, this run's is"):
        refuse_changes(then, now, "step_00000004")
    with pytest.raises(UserError, match=key):
        reshape.check(then, {**then, "ranks": 2}, tmp_path)


def test_without_an_optimizer_adamw_is_chosen_and_offload_gets_deepspeeds_own(tmp_path):
    plain, _ = resolved(tmp_path, {"zero_optimization": {"stage": 2}})
    assert plain["optimizer"]["params"]["torch_adam"] is True
    offloaded, _ = resolved(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert "torch_adam" not in offloaded["optimizer"]["params"]
