"""What models answer, read as a harvest, and how far a trained one has moved.

[`models`] loads them and cuts prompts and answers to length, [`run`] has them answer and reads it, and [`observed`] says how far every feature and
cluster has moved, which predictions are held against.
"""
