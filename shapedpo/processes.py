"""What the processes of a run have to agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object


@contextmanager
def all_or_none() -> Iterator[None]:
    """If one process fails inside, all do, and say what its error was.

    Otherwise the others would wait for it: where a file is missing on one machine of several, until the collective library gives up.
    All processes must come here together, and none may wait for another inside.

    Raises:
        RuntimeError: Where another process has failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        messages = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
        failed = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if failed is not None and failure is None:
            raise RuntimeError(f"Process {failed} has failed, and so this one ends too. {messages[failed]}")
    if failure is not None:
        raise failure
