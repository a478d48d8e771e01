"""Judging samples: metrics, the protocol that every run follows, and its report."""
