"""Figures of the multilabel study."""
