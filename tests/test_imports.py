"""Imports point down only (docs/ARCHITECTURE.md): programs -> train -> engine -> model -> kernels, data -> config."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "minimind_ds"
# Lower layers first; a module may import from its own layer and from those before it.
LAYERS = [
    {"config", "lazy_compiler", "op_build"},
    {"run_config", "tokenizer", "kernels", "data"},
    {"weights", "loss", "ds_config"},
    {"model", "metrics", "lora"},
    {"expert_parallel"},
    {"parallel"},
    {"engine", "whole", "checkpoint", "reshape", "memory", "signals", "watchdog", "guard",
     "stragglers", "saving"},
    {"restarts", "preflight"},
    {"job", "export", "planner"},
    {"step"},
    {"train", "chat", "score", "padded"},
    {"benchmark", "kernel_check", "verify", "plan", "plan_check"},
]
# deepspeed is imported by these only.
DEEPSPEED = {"engine", "checkpoint", "train", "job", "ds_config", "kernels/deepspeed_ops",
             "parallel", "expert_parallel", "whole", "lazy_compiler", "op_build"}


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


def layer(dotted: str) -> int | None:
    parts = dotted.split(".")
    if len(parts) < 2 or parts[0] != "minimind_ds":
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)


def test_every_module_has_its_layer():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path, _ in modules()} - {"__init__"}
    assert names <= set().union(*LAYERS), names - set().union(*LAYERS)


def test_no_module_imports_from_a_higher_layer():
    for path, tree in modules():
        own = layer("minimind_ds." + path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        if own is None:
            continue
        above = [name for name in imported(path, tree) if (layer(name) or 0) > own]
        assert not above, (path.name, above)


def test_data_knows_no_model_and_kernels_no_configuration():
    for path, tree in modules():
        folder = path.relative_to(PACKAGE).parts[0]
        banned = {"data": ("minimind_ds.model", "minimind_ds.kernels"), "kernels": ("minimind_ds.config",)}
        names = list(imported(path, tree))
        assert not [n for n in names if n.startswith(banned.get(folder, ("-",)))], path


def test_deepspeed_is_imported_where_it_belongs():
    for path, tree in modules():
        name = path.relative_to(PACKAGE).as_posix().removesuffix(".py")
        if any(n.split(".")[0] == "deepspeed" for n in imported(path, tree)):
            assert name in DEEPSPEED, path


@pytest.mark.by_exec("asserts what is loaded")
def test_importing_the_package_does_not_import_deepspeed():
    import subprocess
    import sys

    code = "import sys, minimind_ds, minimind_ds.model, minimind_ds.export; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)
