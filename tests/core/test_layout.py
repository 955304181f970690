"""How the project is laid out: a top that a forker reads, wings around it, imports one way."""
import ast
from functools import cache

from conftest import ROOT

WINGS = ("sets", "variants", "metrics", "recognition", "latent", "probes", "exchange", "pages")
FILES = sorted(path for wing in ("", *WINGS) for path in (ROOT / wing).glob("*.py")
               if path.name not in ("__init__.py", "my_run.py"))
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


def test_no_circles():
    for name in NAMES:
        assert not any(name in closure(other) for other in imported(name)), name


def test_the_top_imports_no_page_no_probe_and_nothing_latent():
    """What --latents needs is imported where it is asked for."""
    for name in NAMES:
        if "." not in name:
            wings = {other.split(".")[0] for other in imported(name, lazily=True) if "." in other}
            assert not wings & {"probes", "pages"}, name
            assert not any(other.startswith("latent.") for other in closure(name)), name


def test_variants_import_the_model_and_its_layers_only():
    for name in NAMES:
        if name.startswith("variants."):
            top = {other for other in imported(name) if "." not in other}
            assert top <= {"model", "cm_layers", "runtime"}, name


def test_training_imports_nothing_that_measures():
    wings = {name.split(".")[0] for name in closure("train") if "." in name}
    assert wings <= {"sets", "variants"}
