"""Models: torch modules, called with (n_inputs, n_outputs) and the options of their YAML."""
