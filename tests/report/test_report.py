"""A run's report: it says what the run folder says, whatever is missing or hostile in it, and needs nothing else; in a
real browser it draws, asks for nothing, runs nothing of the run's, fits a phone, obeys the keyboard.

    python -m pytest tests/report
"""

import base64
import contextlib
import hashlib
import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from minimind_ds import programs, report
from minimind_ds.data import IGNORE
from minimind_ds.distributed.world import alone
from minimind_ds.report import curves, data, folder, page, tables
from minimind_ds.training import history
from minimind_ds.training.prepare import prepare
from minimind_ds.training.resume import ResumePoint
from tests.conftest import ROOT, cache_dir, environment
from tests.report.browser import Browser, find

ATTACK = "</span></script><script>hacked=1</script><img src=x onerror=hacked=1>"
# Of files: no slash.
NAME = "<img src=x onerror=hacked=1> $$x^2$$ & \"'"
STEPS, STOP = 8, 3
# What is in the place of each chart, and how wide it is.
DRAWN = """[...document.querySelectorAll(".plot")].map((one) => [one.childElementCount,
           one.firstElementChild.getBoundingClientRect().width])"""
TAB, ENTER = ("Tab", 9), ("Enter", 13)


def start(save_dir, path, *flags, code=0):
    words = ["--deepspeed", "zero0", "--hidden_size", "32", "--num_hidden_layers", "1", "--dtype",
             "fp32", "--data_path", path, "--save_dir", save_dir, "--cache_dir", cache_dir(), "--max_seq_len", "96",
             "--pack_len", "192", "--max_steps", STEPS, "--eval_fraction", "0.2", "--eval_interval", "4",
             "--save_interval", "4", "--keep_best", *flags]
    done = subprocess.run([sys.executable, "launch/sft.py", *map(str, words)], cwd=ROOT, env=environment(), text=True,
                          capture_output=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> (a run's folder, what its two starts printed, the report of the first): stopped by plan, then finished."""
    home = tmp_path_factory.mktemp("report")
    path, run = home / f"{NAME}.jsonl", home / NAME
    with path.open("w") as file:
        for i in range(40):
            turns = [{"role": "user", "content": f"{i} {ATTACK} 你好"},
                     {"role": "assistant", "content": f"{ATTACK} {'word ' * (i % 9)}"}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    first = start(run, path, "--stop_after", STOP)
    early = (run / "report.html").read_text()
    return run, [first.stdout, start(run, path).stdout], early


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run's folder to spoil."""
    shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    return tmp_path / "run"


class Page(html.parser.HTMLParser):
    """scripts: of those that run, their text; named: attributes by element; text: what stands on the page."""

    def __init__(self, content):
        super().__init__()
        self.scripts, self.elements, self.text, self.inside = [], [], "", None
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes))
        if tag == "script" and "type" not in dict(attributes):
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, content):
        if self.inside and self.inside[0] == "script":
            if "type" not in self.inside[1]:
                self.scripts[-1] += content
        elif not self.inside or self.inside[0] != "style":
            self.text += content


def harmless(content):
    """The page, which holds no script and no attribute that is not ours."""
    assert len(content.encode()) < 5 << 20
    found = Page(content)
    assert len(found.scripts) == 3
    policy = next(a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    own = {"sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in found.scripts}
    assert set(re.findall("sha256-[^']+", policy)) == own
    assert "default-src 'none'" in policy and "unsafe" not in policy.partition("script-src")[2].partition(";")[0]
    for tag, attributes in found.elements:
        assert tag not in ("img", "iframe", "object", "link", "base") and not {a for a in attributes if a[:2] == "on"}
        for name in ("href", "src", "action"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    return found


def rendered(path):
    return page.render([report.of_folder(path)])


def test_a_run_leaves_its_report_and_names_it(trained):
    run, said, early = trained
    for text in said:
        assert text.count(f"report: {run / 'report.html'}\n") == 1
    assert "as planned (--stop_after); 1 start" in harmless(early).text
    found = harmless((run / "report.html").read_text())
    for text in (NAME, ATTACK, "finished", "2 starts", f"step {STEPS} of {STEPS}", "stopped after step 3, as planned",
                 "max_steps", "Measured, rank 0, CPU", "Planned peak of a rank", "best/sft_32.safetensors"):
        assert text in found.text.replace("</span><span", ""), text
    assert "Not shown" not in found.text
    # A finished run that is started again is left as it is.
    before = (run / "report.html").stat().st_mtime_ns
    path = next(run.parent.glob("*.jsonl"))
    assert "report:" not in start(run, path).stdout and (run / "report.html").stat().st_mtime_ns == before


def test_what_is_read_is_what_the_run_wrote(trained):
    found = folder.read(trained[0])
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert found.steps["step"].tolist() == list(range(1, STEPS + 1)) and found.stride == 1
    assert found.steps["loss"].tolist() == [line["loss"] for line in steps]
    assert found.evaluations == [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    for line in steps:
        assert all(line[part] >= 0 for part in ("data_s", "forward_s", "backward_s"))
        assert line["data_s"] + line["forward_s"] + line["backward_s"] < line["step_s"]
    one, other = found.starts
    assert (one["end"], one["end_step"], one["planned"], one["step"]) == ("stopped", STOP, True, 0)
    assert (other["end"], other["step"], other["steps_again"]) == ("finished", STOP, 0)
    assert one["began"] < one["ended"] < other["began"] and 0 < one["bytes_before"] < one["peak_bytes"]
    facts = {fact.name: fact.value for fact in tables.facts(found)}
    assert facts["Final loss"] == f"{steps[-1]['loss']:.4f}" and facts["Exit"] == "finished"
    assert facts["Best evaluation"] == f"{min(loss for _, loss in found.evaluations):.4f}"


def test_rows_and_samples_are_the_run_s_own_token_for_token(trained):
    opened = data.reopened(folder.read(trained[0]))
    looked = data.look(opened)
    assert looked.n_samples == len(opened.store) == sum(looked.counts) and len(looked.samples) == data.SAMPLES
    for number, row in enumerate(looked.rows):
        indices = opened.plan.packed[number]
        assert [end - first for _, first, end in row.samples] == opened.store.lengths[indices].tolist()
        assert [first for _, first, _ in row.samples] == [0, *(end for *_, end in row.samples[:-1])]
        assert row.learnt_tokens == opened.store.labelled[indices].sum()
    for shown, index in zip(looked.samples, data.some(opened.store, data.SAMPLES, opened.run.seed).tolist()):
        ids, labels = opened.store.read([index])
        tokens = [*shown.first, *shown.last]
        assert [i for _, i, _ in tokens] == ids.tolist() and not shown.left_out
        # A token is learnt where the one before it has a label.
        assert [told for *_, told in tokens] == [False, *(labels[:-1] != IGNORE).tolist()]
        assert ATTACK in "".join(text for text, *_ in tokens)


def test_a_long_sample_is_shown_by_its_ends(trained, monkeypatch):
    monkeypatch.setattr(data, "FIRST_TOKENS", 7)
    monkeypatch.setattr(data, "LAST_TOKENS", 2)
    for shown in data.look(data.reopened(folder.read(trained[0]))).samples:
        assert (len(shown.first), len(shown.last), shown.left_out) == (7, 2, shown.length - 9)


@pytest.mark.parametrize("name, said", [
    ("metrics.jsonl", "metrics.jsonl"), ("run.yaml", "run.yaml"), ("ds_config.json", "ds_config.json"),
    ("starts.json", "starts.json"), ("tokenizer", "tokenizer"), ("DONE", None), ("last.json", None),
    ("best.json", None)])
def test_without_a_file_the_rest_is_there_and_what_is_missing_is_said(copied, name, said):
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = harmless(rendered(copied)).text
    assert ("Not shown" in found) == (said is not None) and (said or "") in found
    if path.suffix:
        path.write_text('{"step": ')
        found = harmless(rendered(copied)).text
        assert "Not shown" in found and name in found


def test_torn_lines_an_interrupted_run_and_moved_data_are_said(copied):
    whole = (copied / "metrics.jsonl").read_text()
    (copied / "metrics.jsonl").write_text(whole[:whole.rindex('"eval_loss"')])
    (copied / "DONE").unlink()
    starts = json.loads((copied / "starts.json").read_text())
    del starts["starts"][-1]["end"], starts["starts"][-1]["ended"]
    (copied / "starts.json").write_text(json.dumps(starts))
    yaml = (copied / "run.yaml").read_text()
    (copied / "run.yaml").write_text(yaml.replace(".jsonl", ".moved.jsonl"))
    found = harmless(rendered(copied)).text
    for text in ("no end", "it still runs, or was killed", "a line of metrics.jsonl cannot be read", ".moved.jsonl",
                 "does not exist"):
        assert text in found, text
    assert "Packed rows" not in found and "Loss" in found
    # What is not in the cache is not tokenised for a picture.
    (copied / "run.yaml").write_text(re.sub("cache_dir: .*", f"cache_dir: {copied / 'none'}", yaml))
    assert "is not in the token cache" in harmless(rendered(copied)).text and not (copied / "none").exists()


HOSTILE = [None, True, [], {}, ATTACK, -1, 1e308, 10**400, "NaN"]


def test_a_hostile_run_folder_gives_a_harmless_report(copied):
    """Any value in the place of any other, text that is markup, numbers that are none."""
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    head, step = json.loads(lines[0]), json.loads(lines[1])
    bad = [{**step, name: value} for name in step for value in HOSTILE]
    bad += [{**head, name: value} for name in head for value in HOSTILE]
    bad += [{"step": 1, "epoch": 0, key: value} for key in ("eval_loss", "changed", "note", "slowest_rank", "skipped",
                                                            f"eval_loss/{ATTACK}") for value in HOSTILE]
    source = head["data"][0]
    bad += [{**head, "data": [{**source, "file": {**source["file"], "cut": value, "too_long": value}, "name": ATTACK,
                               "tokens": value}]} for value in HOSTILE]
    bad += [{"step": 2, "epoch": 0, "changed": {ATTACK: [ATTACK, ATTACK]}}, {"step": 2, "note": ATTACK, "skipped": 1}]
    text = "\n".join([*map(json.dumps, bad), "[1]", "\ud800 {", '{"step": NaN}', "[" * 5000])
    (copied / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    starts = json.loads((copied / "starts.json").read_text())["starts"]
    for value in HOSTILE:
        broken = [{**starts[0], name: value} for name in starts[0]] + [{"end": "failed", "error": ATTACK}]
        (copied / "starts.json").write_text(json.dumps({"starts": broken[::-1]}))
        (copied / "attempts.json").write_text(json.dumps({"job": 1, "began": 0, "failures": [{"at": ATTACK}, value]}))
        (copied / "best.json").write_text(json.dumps({"file": value, "step": ATTACK}))
        (copied / "ds_config.json").write_text(json.dumps({ATTACK: 1}))
        content = rendered(copied)
        assert ATTACK in harmless(content).text and ATTACK not in content


def test_files_that_are_none_are_named(copied, tmp_path, capsys):
    (copied / "metrics.jsonl").unlink()
    os.mkfifo(copied / "metrics.jsonl")
    assert "metrics.jsonl is no regular file" in harmless(rendered(copied)).text
    assert programs.start("report", [str(tmp_path)]) == 2
    assert programs.start("report", [str(copied), "--out", str(tmp_path / "no" / "x.html")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "holds no run" in said[0] and "cannot write" in said[1] and len(said) == 2


def test_several_runs_stand_beside_each_other_with_what_differs(trained, copied, tmp_path, capsys):
    text = (copied / "run.yaml").read_text()
    (copied / "run.yaml").write_text(re.sub("warmup_steps: .*", "warmup_steps: 7", text))
    out = tmp_path / "both.html"
    assert programs.start("report", [str(trained[0]), str(copied), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    found = harmless(out.read_text())
    assert "Settings in which the runs differ" in found.text and found.text.count("Exit") == 1
    assert tables.value_of(["a.jsonl", {"path": "b.jsonl", "share": 2}]) == "a.jsonl, b.jsonl (share 2)"
    rows = tables.differing([report.of_folder(trained[0]), report.of_folder(copied)])
    assert ["warmup_steps", "0", "7"] in rows and len(rows) == 1
    for chart in curves.charts([folder.read(trained[0]), folder.read(copied)]):
        assert {line["run"] for line in chart.lines} == {0, 1} and not chart.stacked
    assert programs.start("report", [str(copied)] * 9) == 2


def test_a_report_that_cannot_be_made_is_one_line_and_no_error(trained, copied, tmp_path, monkeypatch, capsys):
    nowhere = types.SimpleNamespace(folder=tmp_path / "none")
    programs.write_report(nowhere)
    monkeypatch.setitem(sys.modules, "bokeh.util.paths", None)
    assert programs.start("report", [str(copied)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("report: not written: ") and said.out.count("\n") == 1
    assert said.err.count("\n") == 1 and "need Bokeh (pip install bokeh)" in said.err
    # One that takes too long is not waited for.
    monkeypatch.setattr(programs, "REPORT_S", 0)
    monkeypatch.setattr(report, "of_prepared", lambda prepared: (_ for _ in ()).throw(RuntimeError("late")))
    programs.write_report(nowhere)
    assert capsys.readouterr().out.startswith("report: not written")


def test_each_start_is_noted_with_its_end_and_one_that_starts_over_has_no_past(trained, tmp_path):
    def prepared(*flags):
        words = ["--deepspeed", "zero0", "--hidden_size", "32", "--num_hidden_layers", "1", "--save_dir", tmp_path,
                 "--cache_dir", cache_dir(), "--data_path", next(trained[0].parent.glob("*.jsonl")), *flags]
        return prepare("sft", list(map(str, words)), alone())

    def ends(run, error=None, point=None):
        point = point or ResumePoint()
        with contextlib.suppress(type(error)), history.AtEnd(run, point, reported.append), \
                history.Recorded(run, point):
            if error:
                raise error
        return [(start["step"], start["steps_again"], start["end"]) for start in history.read(tmp_path)]

    reported, run = [], prepared()
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    assert ends(run, RuntimeError(ATTACK)) == [(0, 4, "failed")] and reported == [run]
    point = ResumePoint(tmp_path, step=3)
    assert ends(run, OSError("x"), point) == [(0, 4, "failed"), (3, 1, "failed")] and len(reported) == 2
    assert len(ends(run, None, ResumePoint(step=3, finished=True))) == 2 and len(reported) == 2
    (tmp_path / "starts.json").write_text("{")
    (tmp_path / "report.html").write_text("of the run before")
    assert ends(run, OSError("x"), point) == [(3, 1, "failed")] and (tmp_path / "report.html").exists()
    assert ends(prepared("--from_resume", "none"), OSError("x")) == [(0, 0, "failed")]
    assert not (tmp_path / "report.html").exists()
    assert "failed" in harmless(rendered(tmp_path)).text


def test_a_long_run_is_drawn_with_few_points_and_its_spikes(tmp_path, monkeypatch):
    n, at = 6000, 4321
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, n + 1):
            loss = 50.0 if step == at else None if step == 10 else 2 + math.sin(step)
            file.write(json.dumps({"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10}) + "\n")
    found = folder.read(tmp_path)
    loss, = (chart for chart in curves.charts([found]) if chart.name == "loss")
    raw, smooth = loss.lines
    assert raw["kind"] == "raw" and len(raw["x"]) == len(raw["high"]) == curves.MOST_POINTS
    assert max(raw["high"]) == 50 and min(raw["low"]) == pytest.approx(1, abs=1e-3)
    # Sines over the window come to little; the spike is a 60th of it.
    assert 2.5 < max(smooth["y"]) < 4 and len(smooth["x"]) == curves.MOST_POINTS
    assert not [chart for chart in curves.charts([found]) if chart.name == "step_s"]
    monkeypatch.setattr(folder, "MOST_STEPS", 1000)
    found = folder.read(tmp_path)
    assert found.stride == 6 and len(found.steps["step"]) == 1000 and tables.total(found, "tokens") == 10 * n
    values = np.array([1.0, np.nan, 3.0] + [5.0] * 997)
    assert curves.smoothed(values)[:2].tolist() == pytest.approx([np.nanmean(values[:6]), np.nanmean(values[:7])])


@pytest.fixture(scope="module")
def browser():
    if find() is None:
        (pytest.fail if os.environ.get("MINIMIND_DS_NEEDS_ALL") else pytest.skip)("no chromium here")
    with Browser() as one:
        yield one


def test_the_report_works_in_a_browser(trained, browser):
    path = trained[0] / "report.html"
    for width, dark in ((1280, False), (390, True)):
        browser.open(path, width=width, dark=dark)
        assert browser.value("document.documentElement.dataset.drawn") == ("dark" if dark else "light")
        drawn = browser.value(DRAWN)
        assert len(drawn) == 5 and all(children == 1 and size > 300 for children, size in drawn), drawn
        assert not browser.value("document.documentElement.scrollWidth > innerWidth"), width
        assert browser.value("typeof hacked") == "undefined"
    # Another colour scheme draws them anew.
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.wait("document.documentElement.dataset.drawn === 'light'")
    assert [children for children, _ in browser.value(DRAWN)] == [1] * 5
    assert browser.errors == []
    asked = [address for address in browser.requests if not address.startswith("data:")]
    assert asked == [path.resolve().as_uri()] * 2


def test_everything_is_reached_by_keyboard_and_every_table_has_its_names(trained, browser):
    browser.open(trained[0] / "report.html", width=1280)
    browser.press(*TAB)
    assert browser.value("document.activeElement.className") == "skip"
    browser.press(*ENTER)
    assert browser.value("document.activeElement.id") == "main"
    seen = []
    while len(seen) < 200 and browser.value("document.activeElement !== document.body"):
        browser.press(*TAB)
        seen.append(browser.value("document.activeElement.tagName + ' ' + document.activeElement.textContent.trim()"))
    assert sum(name.startswith("SUMMARY") for name in seen) == browser.value(
        "document.querySelectorAll('summary').length")
    browser.value("[...document.querySelectorAll('summary')].at(-1).focus()")
    browser.press(*ENTER)
    assert browser.value("[...document.querySelectorAll('details')].at(-1).open")
    assert browser.value("document.querySelectorAll('table').length") >= 5
    assert browser.value("[...document.querySelectorAll('table')].every((one) => one.caption.textContent && "
                         "one.querySelector('thead th[scope=col]') && one.querySelector('tbody th[scope=row]'))")
    assert browser.value("[...document.querySelectorAll('svg, .plot')].filter((one) => !one.closest('.bk-root'))"
                         ".every((one) => one.getAttribute('aria-label'))")
