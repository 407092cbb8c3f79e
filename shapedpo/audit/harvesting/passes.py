"""Going over a harvest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...progress import progress_bar
from .shards import SPANS
from .store import Harvest, Shard


class Passes:
    """The shards of a harvest, as often as asked for, with the frequencies and where each shard's rows are.

    Args:
        harvest: The harvest; one of its shards is in memory at a time.
        progress: Whether to show a bar of each pass.

    Example:
        ```python
        passes = Passes(Harvest.open("audits/goblin/harvest"))
        for place, shard in passes("Counting", ("chosen",)):
            seen[place] = shard.chosen.freq.getnnz(axis=1)
        ```
    """

    def __init__(self, harvest: Harvest, progress: bool = True) -> None:
        self.harvest, self.progress = harvest, progress

    def __call__(self, what: str, spans: Sequence[str] = SPANS) -> Iterator[tuple[slice, Shard]]:
        """One pass.

        Args:
            what: What the bar says.
            spans: Which spans to read; the others are `None`.
        """
        begin = 0
        with progress_bar(total=self.harvest.n_rows, desc=what, unit=" pairs", show=self.progress) as bar:
            for shard in self.harvest.shards(("freq",), spans):
                yield slice(begin, begin + len(shard.rows)), shard
                begin += len(shard.rows)
                bar.update(len(shard.rows))
