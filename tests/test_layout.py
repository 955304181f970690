"""How the project is laid out: imports go downwards only; lines and functions are short."""
import ast

import pytest
from conftest import ROOT

# my_run.py is what the README calls a file of the reader's own, which is no part of the project
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "my_run.py")
PATTERNS = ("*.py", "tests/*.py", "*.sh", "*.md", "pages/*")
TEXTS = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))

FLOORS = (      # from the ground up: a file imports files of lower floors, runtime and disk
    ("model", "cm_layers", "augment", "metrics", "inception", "readers", "packing", "runtime",
     "disk", "theory_sim", "budget", "latent_export", "page"),
    ("consistency", "experts", "data", "dit", "exchange", "latent_cache", "autoencoder"),
    ("networks", "text_dit", "captions"),
    ("losses", "sample"),
    ("resnet", "figures"),
    ("features", "loop"),
    ("train", "image_sets", "classify"),
    ("evaluate", "prune_probe", "capacity_probe", "latent", "bench", "peers", "study"),
    ("report", "copy_probe", "text_to_image"),
)
CORE = {        # all that a file of the floors 1 to 3 imports, besides runtime and disk
    "consistency": {"model"},
    "experts": {"cm_layers"},
    "data": {"readers", "packing"},
    "losses": {"model", "cm_layers", "augment", "consistency"},
    "dit": {"model"},
    "exchange": {"model"},
    "latent_cache": {"packing"},
    "autoencoder": {"model"},
    "networks": {"dit", "model"},
    "text_dit": {"dit", "model"},
    "captions": {"data", "readers"},
    "sample": {"model", "cm_layers", "experts", "consistency", "data", "networks",
               "exchange"},
}


def parse(name):
    """The syntax tree of a file."""
    return ast.parse((ROOT / name).read_text())


def ours(tree):
    """{module: names taken from it} of the project's files that a file imports, anywhere in it."""
    files = {name.removesuffix(".py") for name in SCRIPTS}
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, set())
        elif isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return {module: names for module, names in found.items() if module in files}


def allowed(module):
    """What a file may import."""
    floor = next(k for k, files in enumerate(FLOORS) if module in files)
    if module in ("runtime", "disk"):
        return {"runtime"} - {module}
    if module in CORE:
        return {"runtime", "disk"} | CORE[module]
    return {"runtime", "disk"}.union(*FLOORS[:floor])


def test_every_file_has_a_floor():
    listed = [f"{module}.py" for files in FLOORS for module in files]
    assert sorted(listed) == SCRIPTS


def test_the_core_is_laid_out_downwards():
    for floor, files in enumerate(FLOORS[1:4], 1):
        for module in files:
            assert CORE[module] <= set().union(*FLOORS[:floor])


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_go_downwards_only(name):
    imported = ours(parse(name))
    assert set(imported) <= allowed(name.removesuffix(".py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_file_uses_the_main_of_another(name):
    tree = parse(name)
    imported = ours(tree)
    assert not [module for module, names in imported.items() if "main" in names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "main":
            assert not (isinstance(node.value, ast.Name) and node.value.id in imported)


def name_or_two(tree):
    """Scripts of the upper floors from which a file takes one or two names only."""
    libraries = {"resnet", "features", "loop", "image_sets"}    # nobody starts them
    upper = {module for files in FLOORS[4:] for module in files} - libraries
    return {module for module, names in ours(tree).items()
            if module in upper and 0 < len(names) <= 2}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_is_a_library_for_a_name_or_two(name):
    """What two scripts need is in a file below both."""
    assert not name_or_two(parse(name))


# --------------------------------------------------------------------------------------------------
# Lines and functions

def may_be_long(line, name):
    """Whether a line of a Markdown file is a table's row, an image or a link."""
    return name.endswith(".md") and (line.startswith("|") or "](" in line)


@pytest.mark.parametrize("name", TEXTS)
def test_no_line_is_over_100_characters(name):
    lines = (ROOT / name).read_text().splitlines()
    long = [k for k, line in enumerate(lines, 1) if len(line) > 100 and not may_be_long(line, name)]
    assert not long, f"{name}: lines {long}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_function_is_over_60_lines(name):
    functions = [node for node in ast.walk(parse(name))
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert not {f: length for f, length in lengths.items() if length > 60}


def unpacks_many(node):
    """Whether a statement is like `a, b, c = 1, 2, 3`."""
    literal = (ast.Tuple, ast.List)
    if not isinstance(node, ast.Assign) or not isinstance(node.value, literal):
        return False
    return any(isinstance(target, literal) and len(target.elts) >= 3 for target in node.targets)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_assignment_unpacks_three_values_from_a_literal(name):
    lines = [node.lineno for node in ast.walk(parse(name)) if unpacks_many(node)]
    assert not lines, f"{name}: lines {lines}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_conditions_are_not_nested(name):
    """No `a if b else c if d else e`."""
    found = [node.lineno for node in ast.walk(parse(name)) if isinstance(node, ast.IfExp)
             and isinstance(node.orelse, ast.IfExp)]
    assert not found, f"{name}: lines {found}"


def without_annotation(function):
    """What lacks an annotation in a function: its arguments, or what it returns."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    lacking = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
    if function.returns is None and function.name != "__init__":
        lacking.append("return")
    return lacking


@pytest.mark.parametrize("name", ["model.py", "cm_layers.py", "losses.py", "metrics.py", "data.py"])
def test_functions_of_the_core_are_annotated(name):
    """All but scripts' flags and mains, and what is inside of other functions."""
    tree = parse(name)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [node for body in (tree, *classes) for node in body.body
                 if isinstance(node, ast.FunctionDef)]
    lacking = {f.name: without_annotation(f) for f in functions
               if f.name != "main" and not f.name.endswith("_flags")}
    assert not {f: names for f, names in lacking.items() if names}
