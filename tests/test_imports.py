"""Imports point down only (docs/ARCHITECTURE.md), and the package never imports its tests."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "minimind_ds"
# Lowest first; a module may import from its own level and from those before it.
LEVELS = [
    {"installed", "io", "paths", "terminal"},
    {"config"},
    {"kernels", "data"},
    {"model", "convert"},
    {"distributed"},
    {"checkpoint", "resilience"},
    {"training"},
    {"inference", "plan", "verify", "bench"},
    {"report"},
    {"programs"},
    {"__main__"},
]
# Wings that must not know each other although their level or a lower one would allow it.
BANNED = {"data": ("minimind_ds.model", "minimind_ds.kernels"),
          "kernels": ("minimind_ds.config.model", "minimind_ds.config.run", "minimind_ds.config.deepspeed_json",
                      "minimind_ds.data")}
# Wings that may import deepspeed; kernels only in the file named here.
DEEPSPEED = {"config", "distributed", "checkpoint", "training"}
DEEPSPEED_FILES = {"kernels/deepspeed_ops.py"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imported(path: pathlib.Path, tree: ast.AST):
    """Dotted names that a module imports, relative ones made absolute."""
    package = ("minimind_ds", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(p for p in (base, node.module) if p)
            yield origin
            yield from (f"{origin}.{name.name}" for name in node.names)


def wing(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(name: str) -> int | None:
    return next((i for i, names in enumerate(LEVELS) if name in names), None)


def test_every_module_has_its_level():
    names = {wing(path) for path, _ in modules()} - {"__init__"}
    assert names == set().union(*LEVELS)


def test_no_module_imports_from_a_higher_level():
    for path, tree in modules():
        own = level(wing(path))
        if own is None:
            continue
        names = [name for name in imported(path, tree) if name.startswith("minimind_ds.")]
        above = [name for name in names if (level(name.split(".")[1]) or 0) > own]
        assert not above, (path, above)
        assert not [name for name in names if name.startswith(BANNED.get(wing(path), ("-",)))], path


def test_the_package_never_imports_its_tests():
    for path, tree in modules():
        assert not [name for name in imported(path, tree) if name.split(".")[0] == "tests"], path


def test_deepspeed_is_imported_where_it_belongs():
    for path, tree in modules():
        if any(name.split(".")[0] == "deepspeed" for name in imported(path, tree)):
            assert wing(path) in DEEPSPEED or path.relative_to(PACKAGE).as_posix() in DEEPSPEED_FILES, path


@pytest.mark.by_exec("asserts what is loaded")
def test_importing_the_package_does_not_import_deepspeed():
    code = "import sys, minimind_ds, minimind_ds.convert.export; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)


def functions(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def body_lines(function) -> int:
    """Lines of a function without its signature and docstring."""
    first = function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0]
    return function.end_lineno - first.lineno + 1


def test_files_and_functions_stay_readable():
    for path, tree in modules():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
        long = [f.name for f in functions(tree) if body_lines(f) > 60]
        assert not long, (path, long)


# What may be imported inside a function, and why.
LATE = {
    "deepspeed": "takes seconds, which --help and a mistake in a flag need not wait for",
    "minimind_ds.distributed.expert_parallel": "imports deepspeed",
    "pydantic": "comes with deepspeed", "cpuinfo": "comes with deepspeed",
    "triton": "optional: torch's CPU builds come without it",
    "minimind_ds.kernels.triton.operations": "imports triton",
    "minimind_ds.bench.kernels.interpreter": "replaces Triton's interpreter in the process that imports it",
    "minimind_ds.bench.kernels.interpreter_probes": "imports triton once its interpreter is replaced",
    "torch": "processes that only start others hold no device memory",
    "minimind_ds.bench.machine": "imports torch", "minimind_ds.bench.kernels": "imports torch",
    "minimind_ds.bench.throughput": "imports torch, trl or matplotlib",
    "transformers": "slow, and only one of verify's laws needs it",
    "wandb": "optional, and slow", "trl": "optional", "pyarrow": "optional",
    "bokeh": "a run must not fail where only its report would",
}


def test_an_import_inside_a_function_is_of_something_optional_or_slow():
    for path, tree in modules():
        for function in functions(tree):
            for node in ast.walk(function):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = list(imported(path, ast.Module([node], [])))
                    assert any(name == known or name.startswith(known + ".") for known in LATE for name in names), \
                        (path, function.name, names)
