"""Sparse autoencoders of one's own: train one with sae-lens on preference data, check it, find the features of a concept."""
