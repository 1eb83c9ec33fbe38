"""The portfolio study (paper eq. 20): problem, solvers, task, figures, tables and claims."""
