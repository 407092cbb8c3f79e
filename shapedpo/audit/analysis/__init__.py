"""From a harvest to ranked hypotheses and lessons (`OUT/analysis`), on the CPU, without the model.

[`run`] is where to begin: [`~run.analyse`] makes seven passes over the harvest's shards. Its constants are in [`settings`]. [`graph`] and
[`clusters`] group features and rows, [`views`] are the scores that are compared, [`statistics`] compares them, [`leading`] keeps the rows that
score highest. What is found are [`hypotheses`]; [`attribution`] and [`lessons`] put together those that rest on the same rows. [`maps`] says
where clusters lie, for page and labels.
"""
