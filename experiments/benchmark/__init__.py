"""What `make bench` measures: every layer against its peers, in the same run, beside its accuracy."""
