"""Figures of the bilinear study."""
