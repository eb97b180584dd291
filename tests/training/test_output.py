"""What a run prints, for people: lines that fit, a bar on a terminal only, and all of it in the run's log."""

import contextlib
import fcntl
import io
import json
import logging
import os
import pathlib
import re
import struct
import subprocess
import sys
import termios
import threading
import warnings

import pytest

from minimind_ds import terminal
from minimind_ds.training import run_log
from tests.conftest import ROOT, cache_dir, environment, ranks_command
from tests.training.test_training import MODEL
from tests.waiting import HANG_S

LAST = [f"next: python {ROOT / 'launch' / 'chat.py'} --weight run", "report: run/report.html"]
# DeepSpeed's launcher dates its lines; Gloo, in C++, tells standard output of its connections in some builds of torch.
OF_LIBRARIES = ("[20", "[Gloo] ")
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ")


def words(max_steps):
    return [str(ROOT / "launch" / "sft.py"), "--config", "model.yaml", "--deepspeed", "zero2", "--data_path",
            "data.jsonl", "--save_dir", "run", "--cache_dir", cache_dir(), "--max_seq_len", "96", "--pack_len", "192",
            "--max_steps", str(max_steps), "--save_interval", "2", "--log_interval", "2", "--eval_fraction", "0.2",
            "--eval_interval", "2", "--dtype", "fp32"]


def on_a_screen(command, folder):
    """-> what a program shows on a terminal of 80 columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = environment()
    del env["COLUMNS"]
    shown = []

    def read():
        # A terminal that nobody holds open any more is an error to read.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                shown.append(data)

    process = subprocess.Popen(command, cwd=folder, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(timeout=HANG_S) == 0, b"".join(shown).decode()
    reader.join()
    os.close(ours)
    return b"".join(shown).decode()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """-> (folder, what a run of four steps writes into a pipe, what its longer resume shows on a terminal)."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "model.yaml").write_text("preset: debug\nmodel: " + json.dumps(MODEL))
    with (folder / "data.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"prompt": f"{i}?", "completion": f"{i}, " * (1 + i % 5)}) + "\n")
    first = subprocess.run(ranks_command(1, *words(4)), cwd=folder, env=environment(COLUMNS="80"), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=HANG_S)
    assert first.returncode == 0, first.stdout
    return folder, first.stdout, on_a_screen(ranks_command(1, *words(6)), folder)


def test_a_run_says_a_fact_a_line_within_80_columns_and_ends_with_what_to_do_next(runs):
    lines = [line for line in runs[1].splitlines() if not line.startswith(OF_LIBRARIES)]
    assert max(map(len, lines)) <= 80, lines
    for label in ("model", "tokenizer", "data", "samples", "rows", "kernels", "engine", "step", "steps", "weights"):
        assert sum(line.startswith(f"{label}: ") for line in lines) == 1, (label, lines)
    assert re.fullmatch(r"step 4/4  loss \d\.\d{4}  lr \S+  [\d,]+ tokens/s  epoch \d\.\d\d/2  0:00 left", next(
        line for line in lines if line.startswith("step 4/4")))
    # The first, and every second.
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/4", "2/4", "2:", "4/4", "4:"]
    finished, best, *_ = lines[lines.index("weights: run/sft_48.safetensors") - 2:]
    assert re.fullmatch(r"finished after step 4: 4 steps in \d+:\d\d, [\d,]+ tokens/s on average", finished)
    assert re.fullmatch(r"evaluation: loss \S+ \(perplexity \S+\) after step 4", best)
    assert " ".join(" ".join(lines[-4:]).split()).endswith(" ".join(LAST))
    assert "\r" not in runs[1] and "\x1b" not in runs[1]


def test_a_terminal_has_a_bar_that_fits_and_no_line_a_step(runs):
    drawn = [part for part in runs[2].replace("\r\n", "\n").split("\r") if "|" in part]
    assert drawn and all(len(part.split("\n")[0]) <= 80 for part in drawn)
    assert re.search(r"6/6 \|█+\| loss \d\.\d{4}  lr \S+  [\d,]+ tokens/s  epoch \S+/2  0:00 left", runs[2])
    said = [line for line in runs[2].split("\r\n") if line and not line.startswith(OF_LIBRARIES)]
    assert "step 6/6" not in runs[2]
    assert " ".join(" ".join(said[-4:]).split()).endswith(" ".join(LAST))


def test_the_log_has_what_was_printed_at_each_start_with_the_time_and_nothing_of_a_bar(runs):
    folder, printed, _ = runs
    text = (folder / "run" / "run.log").read_text()
    assert all(STAMP.match(line) for line in text.splitlines())
    assert all(character.isprintable() for character in text.replace("\n", "")) and "|█" not in text
    lines = [STAMP.sub("", line) for line in text.splitlines()]
    began, again = (i for i, line in enumerate(lines) if line.startswith("started: sft "))
    # A line of the log is not wrapped.
    assert "".join("".join(lines[began + 1:again]).split()) in "".join(printed.split())
    assert sum(line.startswith("step 6/6  loss") for line in lines[again:]) == 1
    assert any(line.startswith("resuming from run/checkpoints/step_00000004 after step 4") for line in lines[again:])
    assert lines[-2:] == LAST


def test_warnings_libraries_and_a_bug_s_traceback_are_in_the_log(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), run_log.kept(tmp_path, 0, "started") as keep:
        print("a line\nand half")
        # As Python shows it, which pytest keeps to itself.
        sys.stderr.write(warnings.formatwarning("careful", UserWarning, "x.py", 1))
        logging.getLogger("DeepSpeed").error("trouble")
        print("\r 10 %|#  |\r 20 %|## |\x1b[31m red\x1b[0m \x07bell", file=sys.stderr)
        sys.stderr.write("no end")
        keep("unseen")
        raise ZeroDivisionError
    lines = [STAMP.sub("", line) for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines[:3] == ["started", "a line", "and half"] and lines[-1] == "ZeroDivisionError"
    assert any(line.endswith("UserWarning: careful") for line in lines)
    assert {"DeepSpeed: error: trouble", " 20 %|## | red  bell", "no end", "unseen"} <= set(lines)
    out, err = capsys.readouterr()
    assert out == "a line\nand half\n" and "\r 10 %|#" in err and "unseen" not in err
    # Outside, and on other ranks, nothing is kept.
    print("later")
    with run_log.kept(tmp_path, 1, "other"):
        print("other")
    assert [STAMP.sub("", line) for line in (tmp_path / "run.log").read_text().splitlines()] == lines


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "run.log").mkdir()
    with run_log.kept(tmp_path, 0, "started"):
        print("goes on")
    out, err = capsys.readouterr()
    assert out == "goes on\n" and err.startswith("warning: no run.log: ")


def test_lines_are_wrapped_at_blanks_only(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/path-that-is/longer/than/any-terminal/of-forty/columns"
    assert terminal.wrap(f"data: {path} is one word") == f"data:\n    {path}\n    is one word"
    assert terminal.wrap("short   as it is") == "short   as it is"
    table = terminal.columns(["one", "two", "three"], [("row", ["1" * 12] * 3), ("another", ["2", "3", "4"])])
    assert max(map(len, table)) <= 40 and len(table) == 6 and table[3].split() == ["three"]
    assert [line.split()[-1] for line in table] == ["two", "1" * 12, "3", "three", "1" * 12, "4"]


def test_colour_is_for_terminals_whose_user_wants_it(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not terminal.coloured(screen)
    screen.isatty = lambda: True
    assert terminal.coloured(screen)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.coloured(screen)


def test_times_and_paths_read_easily(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert [terminal.duration(s) for s in (0.4, 67, 3754)] == ["0:00", "1:07", "1:02:34"]
    assert terminal.shorter(str(tmp_path / "run" / "x")) == str(pathlib.Path("run", "x"))
    assert terminal.shorter("/elsewhere/x") == "/elsewhere/x"
