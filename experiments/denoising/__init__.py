"""The denoising study (paper E.2): problem, learned operator, task, figures, tables and claims."""
