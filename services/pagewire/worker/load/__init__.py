"""Bringing a model into memory: its files, its weights, and what fits."""
