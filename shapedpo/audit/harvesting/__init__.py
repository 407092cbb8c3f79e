"""From pairs to a harvest on disk (`OUT/harvest`): one pass of the reference, which reads every SAE feature of every span.

[`run`] is where to begin: settings, and [`~run.harvest`], which divides the rows among processes. [`pairs`] tokenises them as training does,
[`layout`] puts pairs that share a prompt into one row of a batch, [`harvester`] runs the model over a shard of them, [`pooling`] takes each
feature's maximum and frequency, [`shards`] writes the files, and [`store`] reads them: all that comes later starts
from a [`~store.Harvest`] and goes over it by [`passes`].
"""
