"""Contextual tasks to train on."""
