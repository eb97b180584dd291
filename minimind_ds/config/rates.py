"""The learning rate where the user names none: by what is trained, and what a run says of it.

    python -c "from minimind_ds.config.rates import usual; print(usual('sft', 'out/pretrain', 0))"
"""

from __future__ import annotations

FROM_NOTHING = 5e-4
# MiniMind's train_full_sft.py and train_lora.py.
FULL_SFT, LORA = 1e-5, 1e-4
ADVICE = "MiniMind's documents advise 1e-6 to 5e-6"


def usual(program: str, from_weight: str, lora_rank: int) -> float:
    """The peak rate of a run of `program` (sft or pretrain) whose user names none."""
    if lora_rank:
        return LORA
    return FULL_SFT if program == "sft" and from_weight != "none" else FROM_NOTHING


def notes(program: str, run) -> list[str]:
    """What to say of a resolved run's rate at its start: who chose it, and what a large one does."""
    if "learning_rate" in run.unused:
        return []
    rate, chosen = run.learning_rate, usual(program, run.from_weight, run.lora_rank)
    full_sft = chosen == FULL_SFT
    if "learning_rate" in run.given:
        if full_sft and rate > FULL_SFT:
            return [f"learning rate {rate:g} ({run.place('learning_rate')}) is above {FULL_SFT:g}, the default of "
                    f"full SFT that starts from weights: larger rates forget what the weights know; {ADVICE}"]
        return []
    if rate != chosen:
        return [f"learning rate {rate:g}, as in the run that goes on; a new one would take {chosen:g}"]
    if run.lora_rank:
        return [f"learning rate {rate:g}, the default of LoRA; --learning_rate names another"]
    if full_sft:
        return [f"learning rate {rate:g}, the default of full SFT that starts from weights; {ADVICE}"]
    if program == "sft":
        return [f"learning rate {rate:g}, the default of SFT that starts from nothing, as of pretraining; with "
                f"--from_weight it is {FULL_SFT:g}"]
    return []
