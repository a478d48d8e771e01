"""Training on several processes: sharded networks, and samples whose tokens are split."""
