"""Seconds and bytes of one step: gated, dense, and what else one could do. Behind `sparkjoy bench`."""
