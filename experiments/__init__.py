"""The research harness: tasks, models, backends, training, studies, figures."""
