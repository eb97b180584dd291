"""The pre-flight check names the node that is unlike the others, unwell or silent."""

import subprocess
import sys

from minimind_ds.resilience.preflight import LIMITS, PACKAGES, judge, judge_connection, table
from tests.conftest import ROOT, free_port, rank_environment
from tests.waiting import HANG_S

USUAL = {name: value for name, (value, _) in LIMITS.items()}


def nodes(count: int, **changes: dict) -> list[dict]:
    """Facts of two ranks on each of `count` healthy nodes; `changes`: by node, what is otherwise."""
    well = {"commit": "abc", "source": "def", "python": "3.12.1", **dict.fromkeys(PACKAGES, "1.0"), "ranks": 2 * count,
            "GPU": "2 x H", "driver": "5", "GPU free": 0.99, "ECC errors": 0, "save_dir": 900.0, "cache_dir": 900.0,
            "clock": 1000.0}
    return [{**well, "rank": rank, "node": f"n{rank // 2}", "uuid": f"gpu{rank}", **changes.get(f"n{rank // 2}", {})}
            for rank in range(2 * count)]


def test_alike_and_healthy_nodes_pass():
    assert judge(nodes(3), USUAL) == [] and judge_connection(nodes(3), USUAL, 1.0) == []


def test_each_way_to_differ_is_one_line_that_names_the_node():
    for change, said in [({"torch": "2.9"}, "n1: torch is 2.9, elsewhere 1.0"), ({"commit": "abd"}, "commit is abd"),
                         ({"GPU": None}, "GPU is none"), ({"save_dir": 3.5}, "save_dir has 3.5 GiB free"),
                         ({"cache_dir": "/x cannot be written to"}, "n1: cache_dir: /x cannot be written to"),
                         ({"GPU": "1 x H"}, "GPU is 1 x H, elsewhere 2 x H")]:
        problems = judge(nodes(3, n1=change), USUAL)
        assert len(problems) == 1 and problems[0].startswith("n1: ") and said in problems[0], problems
    # A GPU is a rank's own: both ranks of the node say so.
    assert len(judge(nodes(3, n2={"ECC errors": 4}), USUAL)) == 2
    assert "rank 4's GPU is free" in judge(nodes(3, n2={"GPU free": 0.5}), USUAL)[0]
    assert judge(nodes(3, n2={"uuid": "same"}), USUAL) == ["n2: ranks 4 and 5 share a GPU; start one task a GPU"]


def test_a_clock_that_is_off_and_a_slow_network_are_named():
    assert judge_connection(nodes(3, n1={"clock": 1007.5}), USUAL, 1.0) == ["n1: its clock is +7.5 s off"]
    assert judge_connection(nodes(3), {**USUAL, "min_bandwidth": 2.0}, 1.0) == [
        "all-reduce over 6 ranks: 1.00 GB/s, less than 2"]


def test_the_table_fits_a_terminal_and_has_columns_for_what_differs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    facts = nodes(3, n1={"GPU": "8 x NVIDIA H200 141GB HBM3e with a long name", "torch": "2.9.0+cu126"})
    lines = table(facts).splitlines()
    assert max(map(len, lines)) <= 80 and "deepspeed: 1.0" in lines and "torch: 1.0" not in lines
    assert sum(line.startswith("n1 ") for line in lines) == sum(line.startswith("n2 ") for line in lines) > 1
    assert "2.9.0+cu126" in table(facts) and "900 GiB free" in table(facts)


def start(ranks: range, of: int, *flags: str) -> list[tuple[int, str]]:
    port = free_port()
    started = [subprocess.Popen([sys.executable, "launch/preflight.py", "--wait_seconds", "20", *flags], cwd=ROOT,
                                env=rank_environment(rank, of, port), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for rank in ranks]
    said = [p.communicate(timeout=HANG_S)[0] for p in started]
    return list(zip([p.returncode for p in started], said))


def test_two_real_ranks_pass_or_are_told_what_is_wrong_with_the_same_exit_code(tmp_path):
    folders = ("--save_dir", str(tmp_path), "--cache_dir", str(tmp_path / "new"), "--preset", "debug")
    (a, said), (b, _) = start(range(2), 2, *folders, "--min_free_gib", "0")
    assert (a, b) == (0, 0) and "pre-flight: all well" in said and "all-reduce over 2 ranks" in said, said
    (a, said), (b, _) = start(range(2), 2, *folders, "--min_free_gib", "1e9")
    assert (a, b) == (2, 2) and "GiB free, less than 1e+09" in said, said


def test_a_silent_rank_is_named():
    [(code, said)] = start(range(1), 2, "--wait_seconds", "2", "--min_free_gib", "0")
    assert code == 2 and "error: rank 1 did not answer within 2 s" in said, said
