"""Every exported name documents its arguments, what it returns and raises, and shows an example that runs.

Exported are the names in ``__all__`` of foldopt and of its public modules. Docstrings are in Google style, one argument
per line.
"""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

import foldopt

griffe = pytest.importorskip("griffe", reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parents[2]
PARSING = {"returns_multiple_items": False, "returns_named_value": False, "warnings": False}
NEEDED = {
    "_gradient_layers": "qpth",
    "cvxpy": "cvxpy",
    "cvxpylayers": "cvxpylayers",
    "gurobi": "gurobipy",
    "qp_solvers": "qpsolvers",
    "qpth": "qpth",
    "scipy_nlp": "scipy",
    "sparse_sqp": "qdldl",
}


def public_modules(module):
    """Return a module and those below it, without the private ones."""
    below = [part for part in module.modules.values() if not part.is_alias and not part.name.startswith("_")]
    return [module, *(inner for part in below for inner in public_modules(part))]


def exported():
    """Return the functions and classes in ``__all__`` of the public modules, by the first name each is exported as."""
    package = griffe.load("foldopt", search_paths=[str(ROOT)], resolve_aliases=True)
    found = {}
    for module in public_modules(package):
        for name in module.exports or ():
            member = module.members[str(name)]
            target = member.final_target if member.is_alias else member
            if target.is_function or target.is_class:
                found.setdefault(target.path, (f"{module.path}.{name}", target))
    return dict(found.values())


EXPORTED = exported()


def arguments(target):
    """Return the names that the docstring has to explain: parameters, with their stars, or the fields of a tuple."""
    if target.is_class and any(str(base) == "NamedTuple" for base in target.bases):
        fields = [m for m in target.attributes.values() if m.annotation is not None and "property" not in m.labels]
        return {m.name for m in fields if not m.is_alias}
    if target.name.endswith("Error") and "__init__" not in target.members:
        return set()
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    names = {stars.get(p.kind, "") + p.name.lstrip("*") for p in target.parameters}
    return {name for name in names if name not in ("self", "cls") and not name.startswith("_")}


def raised(target):
    """Return the names of the errors that a function, or the making of an object, raises by its own statements."""
    makers = [
        target.members[name] for name in ("__init__", "__post_init__") if target.is_class and name in target.members
    ]
    found = set()
    for function in [target] if target.is_function else [m for m in makers if not m.is_alias and m.source]:
        tree = ast.parse("\n".join(line[indent(function.source) :] for line in function.source.splitlines()))
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found.add(getattr(node.exc.func, "id", ""))
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("require_"):
                found.add("InputError")
    return {name for name in found if name and not name.startswith("_")} - {"NotImplementedError"}


def indent(source):
    first = source.splitlines()[0]
    return len(first) - len(first.lstrip())


def shortcomings(target):
    """Return what a docstring lacks, in words."""
    sections = {}
    for section in target.docstring.parse("google", **PARSING) if target.docstring else ():
        sections.setdefault(section.kind.value, []).append(section.value)
    fields = [item for kind in ("parameters", "attributes") for part in sections.get(kind, ()) for item in part]
    explained, asked = {item.name for item in fields}, arguments(target)
    errors = {str(item.annotation).rsplit(".", 1)[-1] for part in sections.get("raises", ()) for item in part}
    shown = "".join(text for part in sections.get("examples", ()) for _, text in part)
    returns = target.is_function and str(target.returns) != "None"
    return [
        *(f"Args: has no line for {name}" for name in sorted(asked - explained)),
        *(f"Args: explains {name}, which is no argument" for name in sorted(explained - asked)),
        *(["no Returns: section"] if returns and "returns" not in sections else []),
        *(f"Raises: has no line for {name}" for name in sorted(raised(target) - errors)),
        *(["no Examples: section with >>>"] if ">>> " not in shown and not target.name.endswith("Error") else []),
    ]


@pytest.mark.parametrize("name", EXPORTED)
def test_docstring_is_complete(name):
    missing = shortcomings(EXPORTED[name])
    assert not missing, f"{name}: {'; '.join(missing)}"


MODULES = sorted({"foldopt", *(target.module.path for target in EXPORTED.values())})


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name):
    for part in name.split("."):
        if part in NEEDED:
            pytest.importorskip(NEEDED[part])
    module = importlib.import_module(name)
    lines = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for case in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"torch": torch, "foldopt": foldopt}):
        runner.run(case, out=lines.append)
    assert not runner.failures, "".join(lines)


def test_what_is_missing_is_noticed():
    code = """
def f(a, b, *params) -> int:
    '''Say little.

    Args:
        a: the first.
        c: no argument.
    '''
    raise InputError("no")
"""
    with griffe.temporary_visited_module(code) as module:
        assert shortcomings(module["f"]) == [
            "Args: has no line for *params",
            "Args: has no line for b",
            "Args: explains c, which is no argument",
            "no Returns: section",
            "Raises: has no line for InputError",
            "no Examples: section with >>>",
        ]
