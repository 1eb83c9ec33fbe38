"""Tables of the denoising study."""
