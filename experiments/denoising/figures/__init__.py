"""Figures of the denoising study."""
