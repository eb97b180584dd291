"""DeepSpeed's launcher as minimind-ds starts it: at Ctrl-C it waits for its ranks, which write a checkpoint.

DeepSpeed's own command, `deepspeed`, leaves with a traceback before they have.

    python -m minimind_ds.distributed.launcher --num_gpus 2 launch/sft.py --deepspeed zero1
"""

from __future__ import annotations

import signal
import sys

from minimind_ds.config.errors import report_bugs


def main(argv: list[str]) -> int:
    """Returns the exit code: DeepSpeed's, or 130 after Ctrl-C."""
    report_bugs()
    from deepspeed.launcher import runner

    heard, code = [], 0
    # The terminal sends it to the ranks, too.
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        runner.main(argv)
    except SystemExit as end:
        code = end.code
    return 128 + signal.SIGINT if heard else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
