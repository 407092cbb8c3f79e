"""Readouts from examples: contrast sets, probes trained on them, and how well they tell what they are for."""
