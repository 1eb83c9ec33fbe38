"""Many runs: studies, the pool of worker processes, Slurm and searches."""
