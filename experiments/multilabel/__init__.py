"""The multilabel study (paper eq. 19 and E.3): problem, task, figures, tables and claims."""
