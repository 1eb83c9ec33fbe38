"""The engine behind `QPLayer` and every verdict: solve, polish, judge. Start reading at `engine.solve`."""
