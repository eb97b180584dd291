"""Names, paths and flags of others reach no shell as anything but text; ShellCheck finds nothing."""

import argparse
import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/slurm/*.sh"), *ROOT.glob("launch/slurm/*.sbatch"),
           ROOT / ".ci/run"]
HOSTILE = ["$(touch owned)", "`touch owned`", "a b", "it's", 'say "hi"', "; touch owned;", "*", "a\\ b", "x\ny", "-n",
           "$HOME", "\\$(touch owned) b",
           "a\t'b", "é ü", ""]


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        assert "MINIMIND_DS_NEEDS_ALL" not in os.environ
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert len(SCRIPTS) >= 11 and done.returncode == 0, done.stdout


@pytest.fixture
def multi_node(tmp_path):
    """multi_node(host file, *flags, script=...) -> the finished process, what ssh was asked, and DeepSpeed's words.

    ssh runs what it is given for the other machine's shell in a shell here; DeepSpeed's launcher notes its words.
    """
    tools, here = tmp_path / "bin", tmp_path / "here"
    # Without a .venv, whose programs the script would take.
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    tools.mkdir()
    here.mkdir()
    (tools / "ssh").write_text("""#!/bin/bash
        printf "%s\\0" "$@" >>"$NOTES/ssh"
        while [ "$1" != -- ]; do shift; done
        exec bash -c "${*:3}"
        """)
    (tools / "pdsh").write_text("#!/bin/bash\nexit 1\n")
    (tools / "deepspeed").write_text('#!/bin/bash\nprintf "%s\\0" "$@" >>"$NOTES/deepspeed"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def words(name):
        path = tmp_path / name
        return path.read_bytes().decode().split("\0")[:-1] if path.exists() else []

    def run(hosts, *flags, script=tmp_path / "launch/multi_node.sh", folder=here):
        (tmp_path / "hosts").write_bytes(hosts)
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "NOTES": str(tmp_path), "MASTER_PORT": "29500"}
        done = subprocess.run(["bash", str(script), str(tmp_path / "hosts"), "sft", *flags], cwd=folder, env=env,
                              capture_output=True, text=True)
        assert not list(tmp_path.rglob("owned")) and not (ROOT / "owned").exists()
        return done, words("ssh"), words("deepspeed")

    return run


@pytest.mark.parametrize("line", [
    b"-oProxyCommand=touch${IFS}owned slots=1", b"-F./config slots=1", b"node1;touch${IFS}owned slots=1",
    b"$(touch${IFS}owned) slots=1",
    b"*  slots=1", b"a@b slots=1", b"node1:0 slots=1", b"node1\\ slots=1", b"\xef\xbb\xbfnode1 slots=1",
    b"\xff\xfe slots=1",
    b"node1 slots=99999999999999999999", b"node1 slots=1\0x", b"node1 slots=8 slots=9",
    b"node1 slots=a[$(touch${IFS}owned)]", b"node1,node2 slots=1",
    b"n" * 300 + b" slots=1", "nöde slots=1".encode()])
def test_a_name_that_is_no_machine_s_is_one_line_and_reaches_no_other_program(multi_node, line):
    done, ssh, started = multi_node(b"node0 slots=1\n" + line + b"\n")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "line 2" in done.stderr and not ssh and not started


def test_flags_reach_the_other_machines_as_they_were_given(multi_node, tmp_path):
    from deepspeed.launcher.multinode_runner import PDSHRunner

    done, ssh, started = multi_node(b"node1 slots=1 # first\nnode-2.x slots=8", *HOSTILE)
    assert done.returncode == 0, done.stderr
    assert ssh.count("--") == 2 and ssh[ssh.index("--") + 1] == "node1" and "node-2.x" in ssh
    given = started[started.index(str(tmp_path / "launch/sft.py")) + 1:]
    # What DeepSpeed's launcher makes of them for pdsh, which joins them with blanks.
    joined = " ".join(PDSHRunner(argparse.Namespace(user_args=given, user_script=""), "").user_arguments)
    remote = subprocess.run(["bash", "-c", f"printf '%s\\0' {joined}"], capture_output=True, text=True)
    assert remote.stdout.split("\0")[:-1] == HOSTILE


@pytest.mark.parametrize("name", ["a b", "it's", '"', "$(touch owned)", "`touch owned`", "a;b", "x\ny"])
def test_a_folder_whose_name_deepspeed_s_launcher_would_run_is_refused(multi_node, tmp_path, name):
    folder, checkout = tmp_path / name, tmp_path / f"checkout {name}"
    folder.mkdir()
    checkout.symlink_to(ROOT)
    for place in ({"folder": folder}, {"script": checkout / "launch/multi_node.sh"}):
        done, ssh, started = multi_node(b"node1 slots=1\n", **place)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "DeepSpeed's launcher takes no" in done.stderr
        assert not ssh and not started


def test_a_batch_script_calculates_with_numbers_only_and_expands_no_pattern(tmp_path):
    def common(script, **variables):
        env = {**os.environ, "SLURM_JOB_ID": "7", "home": str(ROOT), **variables}
        return subprocess.run(["bash", "-c", f'source "{ROOT}/launch/slurm/common.sh"; {script}'], cwd=tmp_path,
                              env=env, capture_output=True, text=True)

    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "MASTER_PORT", "NODE_WAIT", "SLURM_JOB_NUM_NODES"):
        for value in ("a[$(touch owned)]", "x", "1 + 1", "-1", "010", "9" * 30):
            refused = common("echo on", **{name: value})
            assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and name in refused.stderr, refused
            assert not refused.stdout
    for said, variables in (("this is no SLURM job", {"SLURM_JOB_ID": ""}), ("mkdir: ", {"LOG_DIR": "/proc/x"})):
        refused = common("environment", **variables)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and said in refused.stderr, refused
    (tmp_path / "file").touch()
    done = common("words_of FLAGS words; printf '%s,' \"${words[@]}\"", FLAGS="--a *  $(touch owned)\n\t?ile 'x y'")
    assert done.stdout == "--a,*,$(touch,owned),?ile,'x,y',", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("words", [[], [""], ["-x"]])
def test_a_chain_without_a_folder_is_told_its_usage(words):
    done = subprocess.run(["bash", str(ROOT / "launch/slurm/chain.sh"), *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: usage: ") and done.stderr.count("\n") == 1


def test_a_chain_hands_its_flags_on_word_for_word(tmp_path):
    (tmp_path / "sbatch").write_text('#!/bin/bash\nprintf "%s\\0" "$@" >>words\necho 7\n')
    (tmp_path / "sbatch").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FLAGS": "--data_path *",
           "SFT": "$(touch owned) --lora_rank 8"}
    done = subprocess.run(["bash", str(ROOT / "launch/slurm/chain.sh"), "out $(touch owned)"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    words = (tmp_path / "words").read_text().split("\0")
    assert done.returncode == 0 and words.count("*") == 2 and {"$(touch", "owned)",
                                                               "--lora_rank"} <= set(words), done.stderr
    assert f"{tmp_path}/out $(touch owned)/sft" in words and not (tmp_path / "owned").exists()
