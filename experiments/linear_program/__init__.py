"""Linear programs of other papers: shortest path, knapsack and assignment, trained through a smoothed program."""
