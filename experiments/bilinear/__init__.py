"""The bilinear study (paper sections 6 and E.1): problem, smoothing, task, figures, tables and claims."""
