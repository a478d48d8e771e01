"""Letting models that call torch's attention use this package's."""
