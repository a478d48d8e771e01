"""Replacing torch's attention in existing models."""
