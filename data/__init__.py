"""Data generators and loaders, one module per data set."""
