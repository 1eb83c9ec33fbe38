"""Forward black boxes: batched exact solvers of our own, and adapters to others, imported where used."""
