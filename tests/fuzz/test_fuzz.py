"""Every reader, given what others wrote, accepts it or says one line; what was once found otherwise stays found."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment
from tests.fuzz.__main__ import TARGETS, deal
from tests.fuzz.corpus import CORPUS
from tests.fuzz.harness import MOST_SAID, Target, drive, input_of, tried
from tests.waiting import HANG_S

BY_NAME = {target.name: target for target in TARGETS}


@pytest.mark.parametrize("name", CORPUS)
def test_what_was_once_found_is_refused_in_one_line_or_read(name, tmp_path):
    target, case, expected = CORPUS[name]
    kind, said = tried(BY_NAME[target], case() if callable(case) else case, tmp_path)
    assert kind == expected, (kind, said)
    assert kind == "accepted" or said.startswith("error: ") and len(said) < MOST_SAID and said.strip().isprintable()


def test_twenty_thousand_inputs_find_nothing(tmp_path):
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--inputs", "20000", "--processes", "1", "--out",
                           str(out)], cwd=ROOT,
                          env=environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=4 * HANG_S)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["inputs"] >= 19_990 and result["targets"].keys() == BY_NAME.keys()
    # Inputs that are all refused at once, or all accepted, would test little.
    for name, outcome in result["targets"].items():
        assert outcome["accepted"] + outcome["refused"] == outcome["inputs"] > 0, name
        assert outcome["accepted"] or outcome["inputs"] < 50, name


def test_inputs_are_the_same_in_every_process_and_every_target_has_some():
    for target in TARGETS:
        assert repr(input_of(target, 1, 2)) == repr(input_of(target, 1, 2)), target.name
    dealt = deal(TARGETS, 20_000)
    assert {target.name for target, _ in dealt} == BY_NAME.keys()
    assert abs(sum(map(len, (numbers for _, numbers in dealt))) - 20_000) < len(TARGETS)


def crash(case, folder):
    """A reader with every fault there is, by the input's number."""
    import faulthandler
    import os

    # Its report of a crash that is wanted would stand among the suite's own lines.
    faulthandler.disable()
    if case == 0:
        raise KeyError("x")
    if case == 1:
        os.kill(os.getpid(), 11)
    if case == 2:
        while True:
            pass
    if case == 3:
        bytearray(1 << 36)
    if case == 4:
        raise SystemExit(0)
    if case == 5:
        (folder / "left").write_text("x")
        raise ValueError("not a user's error")
    if case == 6:
        os.mkfifo(folder / "pipe")
        (folder / "pipe").read_bytes()
    if case == 7:
        assert not list(folder.iterdir())


def test_the_harness_finds_what_a_reader_can_do_wrong(monkeypatch):
    from tests.fuzz import harness

    monkeypatch.setattr(harness, "CPU_S", 0.5)
    # Time without its cores counts as idle on a busy machine.
    monkeypatch.setattr(harness, "IDLE_S", 6.0)
    numbers = iter(range(100))
    target = Target("crash", lambda draw: next(numbers), crash)
    # Each by itself: a process's numbers begin anew.
    kinds = []
    for number in range(8):
        numbers = iter([number])
        kinds += list(drive([(target, range(1))], 0, processes=1)["crash"].findings)
    assert kinds == ["KeyError in fuzz/test_fuzz.py:crash", "the process died of SIGSEGV",
                     "Hang in fuzz/test_fuzz.py:crash",
                     "MemoryError in fuzz/test_fuzz.py:crash", "exit code 0 after 0 lines, 0 k characters",
                     "ValueError in fuzz/test_fuzz.py:crash", "Hang in pathlib.py:open"][:6] + kinds[6:]
    assert len(kinds) == 7 and kinds[6].startswith("Hang in ")
