"""What features, clusters and findings are called (`OUT/labels.json`).

[`names`] makes them of tokens and keeps them. For `shapedpo label`, [`titles`] asks a language model of [`labellers`] for better ones, in the
words of [`prompts`].
"""
