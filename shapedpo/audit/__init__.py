"""What a preference dataset teaches, before anything is trained (METHOD: arXiv 2606.12360, data-centric audit)."""
