"""Models: torch modules made from (n_inputs, n_outputs) and the options of their YAML."""
