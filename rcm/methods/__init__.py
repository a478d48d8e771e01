"""Methods: which networks, losses and optimizers step when. Each has its own config."""
