"""What the harness asks of a task."""
