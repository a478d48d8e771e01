"""Everything around a training step: the loop, optimizer, averages, checkpoints, run folder."""
