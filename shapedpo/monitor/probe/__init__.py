"""Probe rollouts: sampled during a run, read with the reference, and made into records."""
