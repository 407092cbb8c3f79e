"""From a finding to a fix, for `shapedpo fix`.

[`targets`] says what to read and in which rows, and makes a recipe; [`data`] makes a dataset without those rows; [`preview`] predicts what either
changes.
"""
