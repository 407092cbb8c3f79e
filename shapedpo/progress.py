"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> tqdm:
    """tqdm's bar, unless `show` says otherwise, or `TQDM_DISABLE=1` in the environment, which `disable=False` would overrule."""
    return tqdm(iterable, **options) if show else tqdm(iterable, disable=True, **options)
