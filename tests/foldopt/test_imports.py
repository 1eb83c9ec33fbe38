import importlib
import pkgutil
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

import foldopt

OPTIONAL = ("gurobipy", "cvxpy", "cvxpylayers", "qpth", "hydra", "wandb", "pandas", "experiments", "torch._dynamo")


def test_importing_foldopt_imports_torch_only():
    code = (
        "import sys, foldopt, foldopt.solvers.gurobi, foldopt.solvers.qp;"
        f"print([name for name in {OPTIONAL!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_harness_imports_optional_solvers_where_they_are_used():
    code = (
        "import sys, experiments.run.execution, experiments.backends.cvxpylayers, experiments.portfolio.problem;"
        "print([name for name in ('gurobipy', 'cvxpy', 'cvxpylayers', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ROOT = Path(foldopt.__file__).parent
PUBLIC = [
    name
    for _, name, _ in pkgutil.walk_packages([str(ROOT)], "foldopt.")
    if not re.search(r"\._", name) and name != "foldopt.solvers"  # a folder of modules that offers nothing itself
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_say_what_they_offer(name):
    module = importlib.import_module(name)
    assert module.__all__
    for offered in module.__all__:
        value = getattr(module, offered)
        assert not isinstance(value, types.ModuleType), f"{name} offers the module {offered}"


@pytest.mark.parametrize("name", ["projections", "prox", "errors", "verdicts", "diagnostics", "layers"])
def test_completion_shows_what_is_offered_alone(name):
    module = importlib.import_module(f"foldopt.{name}")
    assert "torch" in vars(module) or name in ("errors", "diagnostics")
    assert dir(module) == sorted(module.__all__)


def test_no_function_hides_a_module():
    for name in foldopt.__all__:
        value = getattr(foldopt, name)
        if not isinstance(value, types.ModuleType):
            assert not (ROOT / name).exists(), name
            assert not (ROOT / f"{name}.py").exists(), name


def test_the_version_is_that_of_the_package():
    assert foldopt.__version__ == metadata.version("foldopt")
