"""Imports run one way: the core imports no page, no probe; variants import the model only."""
import ast
from functools import cache

from conftest import ROOT

WINGS = ("sets", "variants", "metrics", "recognition", "latent", "probes", "exchange", "pages")
FILES = [path for wing in ("", *WINGS) for path in (ROOT / wing).glob("*.py")
         if path.name not in ("__init__.py", "my_run.py")]
NAMES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in FILES}


@cache
def imported(name, lazily=False):
    """The project's files that a file imports; lazily: also inside of its functions."""
    tree = ast.parse(NAMES[name].read_text())
    found = set()
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(NAMES)


def closure(name):
    """All that importing a file imports, itself included."""
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*map(imported, new)) - found
    return found


def wings(names):
    """The wings of these files."""
    return {name.split(".")[0] for name in names if "." in name}


def test_imports_run_one_way():
    for name in NAMES:
        assert not any(name in closure(other) for other in imported(name)), name    # no circles
        if "." not in name:             # what --latents needs is imported where it is asked for
            assert not wings(imported(name, lazily=True)) & {"probes", "pages"}, name
            assert "latent" not in wings(closure(name)), name
        if name.startswith("variants."):
            top = {other for other in imported(name) if "." not in other}
            assert top <= {"model", "cm_layers", "runtime"}, name
    assert wings(closure("train")) <= {"sets", "variants"}      # nothing that measures
