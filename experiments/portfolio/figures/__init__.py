"""Figures of the portfolio study."""
