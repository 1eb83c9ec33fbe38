"""The benchmarks: times and errors of every layer and its peers, measured in the same run."""
