"""From PyTorch models to programs."""
