"""What the harness asks of a problem, a task, a model and a backend: one file each, every member declared."""
