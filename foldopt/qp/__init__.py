"""The engine behind every quadratic program."""
