import subprocess
import sys

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
