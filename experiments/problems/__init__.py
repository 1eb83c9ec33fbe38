"""The mathematics of each study: objective, constraints, exact solve, update, forms for other solvers."""
