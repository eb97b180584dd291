"""Data tokenised before a run, into the cache that the run will find: no GPU, no DeepSpeed, no ranks.

    python launch/tokenize_data.py --program sft --data_path my.jsonl
"""

from __future__ import annotations

import sys

from minimind_ds import terminal
from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.config.run import parse_run_config
from minimind_ds.config.run_flags import KINDS, PROGRAMS
from minimind_ds.distributed.world import alone
from minimind_ds.training import starting_weights
from minimind_ds.training.prepare import choose, find_start_weights, plan_epoch, read_data, split_by_source
from minimind_ds.training.summary import describe_data


def main(argv: list[str]) -> int:
    """The whole of launch/tokenize_data.py.  Returns the exit code."""
    options, flags = program_flags.tokenize().parse_known_args(argv)
    try:
        for line in tokenize(program_of(options.program, options.kind), flags):
            print(terminal.wrap(line), flush=True)
    except UserError as error:
        print(one_line(error), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def program_of(program: str | None, kind: str | None) -> str:
    """The training that --program or --kind means.  Raises ValueError where they differ."""
    of_kind = next((name for name, its in KINDS.items() if its == kind), None)
    if program and of_kind and program != of_kind:
        raise UserError(f"--program {program} reads {KINDS[program]} and --kind is {kind}: give one")
    return program or of_kind or "sft"


def tokenize(program: str, flags: list[str]) -> list[str]:
    """Fills the cache as `program` with these flags would; what the run would say of the data.

    Raises:
        UserError: what the run's start would refuse of the flags, the data or the tokenizer.
    """
    run, chosen = choose(parse_run_config(flags, program, PROGRAMS[program]), alone())
    run, found = find_start_weights(run)
    run, weights, of_checkpoint = starting_weights.open_weights(run)
    run, tokenizer, _, of_weights = starting_weights.tokenizer_and_model(run, weights)
    stores, held_out, notes = read_data(program, run, tokenizer, progress=True)
    said = describe_data(run, KINDS[program], stores[0], split_by_source(held_out, run, 1),
                         plan_epoch(stores[0], run, 1, 0))
    return [*chosen, *found, *of_checkpoint, *of_weights, *notes, f"tokenizer: {tokenizer.name}", *said,
            f"tokenised data: {run.cache_dir}"]
