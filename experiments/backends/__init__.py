"""Backends: from an optimization problem to a layer that a network can be trained through."""
