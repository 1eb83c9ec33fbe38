"""The members that a problem, a task, a model and a backend must or may have; one file each."""
