"""The derivative rules of attention, and how a call gets to them."""
