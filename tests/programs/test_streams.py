"""How a program ends where its output is gone, a path or a package is wrong, or memory and disk are full.

    python -m pytest tests/programs/test_streams.py
"""

import os
import pathlib
import pty
import subprocess
import sys

import pytest

from minimind_ds.data.train_tokenizer import main as train_tokenizer
from minimind_ds.inference.evaluate import check_out as check_result
from minimind_ds.io import write_file
from minimind_ds.report import check_out as check_report
from minimind_ds.training.run_log import kept

ROOT = pathlib.Path(__file__).resolve().parents[2]


def python(code: str, shell: str = "", **options) -> subprocess.CompletedProcess:
    """Runs code without torch, its streams as `shell` says."""
    words = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          **options)


@pytest.mark.parametrize("error, code, said", [
    ("OSError(36, 'File name too long', 'x' * 5000)", 2, "File name too long"),
    ("FileExistsError(17, 'File exists', 'tokenizer')", 2, "tokenizer: File exists"),
    ("PermissionError(13, 'Permission denied', '/root/x')", 2, "/root/x: Permission denied"),
    ("OSError(28, 'No space left on device')", 1, "No space left on device"),
    ("OSError(27, 'File too large')", 1, "File too large"),
    ("ModuleNotFoundError('x', name='psutil')", 2, "has no psutil: activate the environment"),
    ("RuntimeError(\"DefaultCPUAllocator: can't allocate memory: 9\")", 1, "out of memory"),
    ("MemoryError()", 1, "out of memory"),
    ("OSError(5, 'Input/output error', 'x')", 1, "x: Input/output error"),
    ("OSError(30, 'Read-only file system', 'x')", 1, "x: Read-only file system"),
    ("OSError(16, 'Device or resource busy', 'x')", 2, "x: Device or resource busy"),
    ("RuntimeError(\"can't start new thread\")", 1, "no more processes, threads or memory for them here"),
    ("BlockingIOError(11, 'Resource temporarily unavailable')", 1, "no more processes, threads or memory"),
    ("DeprecationWarning('x')", 2, "PYTHONWARNINGS or -W makes an error of a library's DeprecationWarning: x"),
    ("BrokenPipeError(32, 'Broken pipe')", 141, "")])
def test_what_is_wrong_with_the_machine_is_one_line_and_no_bug(error, code, said):
    done = python(f"from minimind_ds.config.errors import report_bugs; report_bugs(); raise {error}")
    assert done.returncode == code and said in done.stderr and len(done.stderr) < 500, done
    assert done.stderr.count("\n") == bool(said), done.stderr


def test_too_few_open_files_are_raised_or_said():
    code = ("import resource; from minimind_ds.config.errors import report_bugs; from minimind_ds import programs; "
            "report_bugs(); programs.allow_files(); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])")
    for limit, said, error in (("-n 20", "", "error: only 20 files may be open at once here (ulimit -n), and 256 are"),
                               ("-Sn 20", "256\n", ""), ("-Sn 300", "300\n", "")):
        done = subprocess.run(["bash", "-c", f'ulimit {limit}; exec "$0" -c "$1"', sys.executable, code], cwd=ROOT,
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.stdout == said and done.stderr.startswith(error) and done.returncode == 2 * bool(error), done
        assert done.stderr.count("\n") == bool(error)


def test_an_unknown_error_is_still_a_bug_with_its_traceback():
    for error in ("OSError(22, 'Invalid argument', 'x')", "RuntimeError('x')", "ModuleNotFoundError('x')"):
        done = python(f"from minimind_ds.config.errors import report_bugs; report_bugs(); raise {error}")
        assert done.returncode == 1 and "Traceback" in done.stderr and "please report it" in done.stderr


TRAINING = """
import os, sys
from minimind_ds.terminal import hold_streams
hold_streams(lasting=True)
sys.stdin.isatty()
for step in range(2000):
    print("step", step, flush=step % 2)
print("error", file=sys.stderr, flush=True)
with open(sys.argv[1], "w") as file:
    file.write(f"finished {file.fileno()}")
    os.write(1, b"a library's line")
    os.write(2, b"another")
"""


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">&-", "2>&-", ">/dev/full 2>&1", "2>&1 | true", "| head -1"])
def test_a_training_outlives_its_output_and_no_file_gets_its_lines(tmp_path, streams):
    out = tmp_path / "out"
    done = python(TRAINING, f"{out} {streams}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0, done
    said, number = out.read_text().split()
    assert said == "finished" and int(number) > 2 and "Traceback" not in done.stderr


def test_what_an_encoding_does_not_have_is_shown_as_escapes(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    for lasting in (True, False):
        done = python(f"from minimind_ds.terminal import hold_streams; hold_streams({lasting}); print('\\u4e2d\\xe9')")
        assert (done.returncode, done.stdout, done.stderr) == (0, "\\u4e2d\\xe9\n", "")


def test_a_locale_of_another_encoding_is_no_matter(monkeypatch, tmp_path):
    """torch opens its own files, which are UTF-8, in the locale's encoding."""
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    done = python("import sys; from minimind_ds import programs; programs.hold_streams(lasting=False); "
                  "programs.read_utf8(); print(sys.flags.utf8_mode, sys.stdout.encoding, sys.stdout.errors)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 ascii backslashreplace\n", "")


def test_a_terminal_that_says_no_width_has_a_bar():
    """As docker exec's, in its first moments."""
    ours, theirs = pty.openpty()
    assert os.get_terminal_size(theirs).columns == 0
    code = """
from tqdm import tqdm
from minimind_ds import terminal
with tqdm(total=2, desc="steps", **terminal.bar_width()) as bar:
    bar.update(2)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 65536).decode().splitlines()[-1]
    os.close(ours)
    assert "steps: 100%" in shown and len(shown.rpartition("\r")[2]) <= 80


def test_a_folder_that_was_deleted_is_said_in_one_line(tmp_path):
    for words in ("sft --save_dir x", "plan --preset debug", "report x"):
        code = 'mkdir "$1/gone"; cd "$1/gone"; rmdir "$1/gone"; exec "$0" -m minimind_ds $2'
        done = subprocess.run(["bash", "-c", code, sys.executable, str(tmp_path), words], capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
        assert "the folder that this was started in: No such file or directory; cd to another" in done.stderr


def test_a_log_whose_disk_is_full_ends_no_training(tmp_path):
    (tmp_path / "run.log").symlink_to("/dev/full")
    with kept(tmp_path, 0, "started"):
        print("a line")
    assert (tmp_path / "run.log").is_char_device()


def test_neither_a_folder_nor_a_device_is_written_over(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", pathlib.Path("/dev/null")):
        with pytest.raises(OSError):
            write_file(path, "x")
    assert pathlib.Path("/dev/null").is_char_device() and os.listdir(tmp_path) == ["folder"]


def test_a_result_replaces_results_and_no_data(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "precious"}\n')
    for check in (check_report, check_result):
        with pytest.raises(ValueError, match="exists and is no"):
            check(data)
    assert train_tokenizer(["--data_path", str(data), "--out", str(data)]) == 2
    assert "exists and is no .model file" in capsys.readouterr().err
    check_result(tmp_path / "new.json")
    check_report(tmp_path / "new.html")
    (tmp_path / "new.json").write_text('{"weight": "out/sft"}')
    check_result(tmp_path / "new.json")
    assert data.read_text() == '{"text": "precious"}\n'
