"""Every DeepSpeed file trains as one rank at stage 0 does, or is refused in one line: ours and those users bring.

The files of others are written after the templates of their projects: same keys, same "auto" values.
"""

import copy
import json
import shutil

import pytest

from minimind_ds.config.deepspeed_json import read_json
from minimind_ds.distributed.world import World
from minimind_ds.training import prepare as prepare_module
from tests.conftest import ROOT

pytestmark = pytest.mark.numeric

FILES = ROOT / "ds_configs"
SHARED = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
          "gradient_clipping": "auto"}
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
STAGE_3 = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
           "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
           "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
           "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True}
TO_CPU = {"device": "cpu", "pin_memory": True}
SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                 "warmup_num_steps": "auto", "total_num_steps": "auto"}}
THEIRS = {
    "Trainer, stage 2, offloaded": {
        **SHARED, "fp16": FP16, "optimizer": ADAMW, "steps_per_print": 2000, "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 2, "offload_optimizer": TO_CPU, "allgather_partitions": True,
                              "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True,
                              "reduce_bucket_size": 2e8, "contiguous_gradients": True}},
    "Accelerate, stage 2, scheduler": {
        **SHARED, "bf16": {"enabled": "auto"}, "scheduler": SCHEDULER, "steps_per_print": float("inf"),
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True,
                                                  "adam_w_mode": True}},
        "zero_optimization": {"stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8,
                              "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": "auto",
                              "contiguous_gradients": True}},
    "Axolotl, stage 1": {
        **SHARED, "zero_optimization": {"stage": 1, "overlap_comm": True}, "bf16": {"enabled": "auto"},
        "fp16": {**FP16, "auto_cast": False}, "wall_clock_breakdown": False},
    "Axolotl, stage 3, parameters offloaded": {
        **SHARED, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "zero_optimization": {**STAGE_3, "sub_group_size": 0, "offload_optimizer": TO_CPU, "offload_param": TO_CPU},
        "bf16": {"enabled": "auto"}, "wall_clock_breakdown": False},
    "LLaMA-Factory, stage 3": {
        **SHARED, "zero_allow_untested_optimizer": True, "fp16": FP16, "bf16": {"enabled": "auto"},
        "zero_optimization": {**STAGE_3, "overlap_comm": False}},
}
OURS = {name: read_json(str(FILES / f"{name}.json")) for name in ("zero2_offload", "zero3_offload",
                                                                  "zero3_offload_param")}
# Elsewhere: zero0 to zero3 in test_layouts.py and test_training.py, moe_ep and ulysses in test_parallel.py.
ELSEWHERE = {"zero0", "zero1", "zero2", "zero3", "moe_ep", "ulysses"}
REFUSED = {"zero3_nvme": "nvme_path is '/local_nvme'", "zeropp": "zero_quantized_weights needs a GPU",
           "zero2_fp16": "no fp16 on this machine"}
CASES = {name: dict(model="dense", stage=config["zero_optimization"]["stage"], file=config)
         for name, config in {**OURS, **THEIRS}.items()}
HALF = dict(model="dense", stage=2, file=read_json(str(FILES / "zero2_fp16.json")),
            flags=["--eval_fraction", "0.02", "--dtype", "fp16"])
SCHEDULED = "Accelerate, stage 2, scheduler"
CONTROLS = {"constant": dict(model="dense", stage=0, accumulation=2),
            "scheduled": dict(model="dense", stage=0, accumulation=2, keys={"scheduler": SCHEDULER})}

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")),
                                    reason="needs g++ and ninja, with which DeepSpeed builds its CPU Adam")


def curves(deepspeed, ranks: int, out, cases: dict) -> dict:
    out.mkdir(exist_ok=True)
    listed = [{"name": name, **case} for name, case in cases.items()]
    deepspeed(ranks, "tests/distributed/ranks/parallel.py", str(out), json.dumps(listed))
    return json.loads((out / "cases.json").read_text())


@pytest.fixture(scope="module")
def control(tmp_path_factory, deepspeed):
    return curves(deepspeed, 1, tmp_path_factory.mktemp("control"), CONTROLS)


@pytest.fixture(scope="module")
def found(tmp_path_factory, deepspeed):
    half = {"zero2_fp16": HALF} if prepare_module.fp16_runs() else {}
    return curves(deepspeed, 2, tmp_path_factory.mktemp("found"), {**CASES, **half})


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_file_trains_as_one_rank_at_stage_0(name, control, found):
    want = control["scheduled" if name == SCHEDULED else "constant"]
    # Law 3's, over all steps.
    for key in ("loss", "norm", "labelled"):
        assert found[name][key] == pytest.approx(want[key], rel=1e-5), key
    assert want["loss"][-1] < want["loss"][0]


@needs_compiler
def test_fp16_skips_until_its_loss_scale_fits_and_then_trains_where_the_processor_has_it(control, found):
    if "zero2_fp16" not in found:
        pytest.skip("DeepSpeed has no fp16 on this processor")
    losses, theirs = found["zero2_fp16"]["loss"], control["constant"]["loss"]
    # The first updates overflow at a scale of 2^16 and are skipped: what follows is the control, some steps later.
    skipped = next(i for i in range(9) if losses[i + 1] < 0.99 * losses[0])
    assert losses[0] == pytest.approx(theirs[0], rel=1e-3) and skipped <= 4
    assert losses[skipped + 1] == pytest.approx(theirs[1], rel=1e-2) and losses[-1] < 0.6 * losses[0]


def test_every_shipped_file_is_trained_or_refused_by_a_test():
    assert {path.stem for path in FILES.glob("*.json")} == {*OURS, *REFUSED, *ELSEWHERE}


def has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


def on_nvme(folder) -> dict:
    config = read_json(str(FILES / "zero3_nvme.json"))
    for block in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][block]["nvme_path"] = str(folder)
    return config


@pytest.mark.slow
@needs_compiler
def test_states_and_parameters_on_nvme_train_as_one_rank_at_stage_0(tmp_path, deepspeed):
    # Compiling DeepSpeed's libaio operation takes minutes.
    if not has_libaio():
        pytest.skip("needs libaio (Debian: libaio-dev)")
    # Under 1 MiB a rank's states stay in memory.
    case = dict(model="dense", fields={"hidden_size": 128})
    flags = ["--eval_fraction", "0.02", "--save_interval", "0"]
    control = curves(deepspeed, 1, tmp_path / "control", {"control": dict(case, stage=0, accumulation=2)})["control"]
    found = curves(deepspeed, 2, tmp_path / "nvme", {
        "nvme": dict(case, stage=3, file=on_nvme(tmp_path), flags=flags),
        "memory": dict(case, stage=3, file=OURS["zero3_offload_param"])})
    assert list(tmp_path.rglob("exp_avg-*.tensor.swp"))
    assert found["nvme"] == found["memory"]
    for key in ("loss", "labelled"):
        assert found["nvme"][key] == pytest.approx(control[key], rel=1e-5), key


def prepare(tmp_path, path, *flags):
    import torch

    return prepare_module.prepare("sft", ["--deepspeed", str(path), "--preset", "debug", "--save_dir",
                                      str(tmp_path / "run"), "--cache_dir", str(tmp_path), *flags],
                              World(0, 8, 0, 8, torch.device("cpu")))


def test_checkpoints_that_nothing_could_go_on_from_are_refused(tmp_path):
    if not has_libaio():
        pytest.skip("needs libaio (Debian: libaio-dev)")
    (tmp_path / "ds.json").write_text(json.dumps(on_nvme(tmp_path)))
    with pytest.raises(ValueError, match="no checkpoints with optimizer states on NVMe.*--save_interval 0"):
        prepare(tmp_path, tmp_path / "ds.json")
    assert not prepare(tmp_path, tmp_path / "ds.json", "--save_interval", "0").keeps_checkpoints


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_machine_cannot_run_is_refused_in_one_line(tmp_path, name):
    if name == "zero2_fp16" and prepare_module.fp16_runs():
        pytest.skip("this processor has fp16")
    with pytest.raises(ValueError, match=REFUSED[name]) as caught:
        prepare(tmp_path, FILES / f"{name}.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, word", [
    (("zero_hpz_partition_size", 3), "zero_hpz_partition_size 3 does not divide the 8 ranks"),
    (("zero_quantized_gradients", True), "zero_quantized_gradients needs a GPU"),
    (("offload_param", {"device": "nvme"}), "offload_param.nvme_path is None"),
    # root may write there, says the system.
    (("offload_param", {"device": "nvme", "nvme_path": "/proc"}), "offload_param.nvme_path is '/proc', which"),
])
def test_parts_of_zero_plus_plus_and_nvme_are_refused_by_name(tmp_path, change, word):
    config = copy.deepcopy(read_json(str(FILES / "zero3.json")))
    config["zero_optimization"][change[0]] = change[1]
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=word):
        prepare(tmp_path, tmp_path / "ds.json")
