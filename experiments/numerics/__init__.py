"""Batched mathematics that the problems of several studies share; it knows no study."""
