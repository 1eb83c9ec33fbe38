"""One run: configuration, folder, components, trainer, checkpoint and tracking."""
