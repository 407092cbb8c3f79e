"""`shapedpo report`: make the page of a run anew from its records."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError, as_user_error
from ..monitor.records import FILE_NAME, read_records
from ..monitor.report import render, write_whole


def main(run: str, *, out: str | None = None) -> int:
    """Write `report.html` of a run.

    Args:
        run: The run's output folder, or a file of records, such as the `concepts.1.jsonl` of an earlier run into the same folder.
        out: Where the page goes; by default beside the records, under their number (`report.1.html`).

    Returns:
        The exit status.

    Raises:
        UserError: If there are no records, or they cannot be read.
    """
    source = Path(run)
    with as_user_error(ValueError, OSError):
        records = read_records(source)
        if not records:
            raise UserError(
                f"{source / FILE_NAME if source.is_dir() else source} has no records: the run has not begun."
            )
        beside = source / FILE_NAME if source.is_dir() else source
        target = Path(out) if out else beside.with_name(f"{beside.stem.replace('concepts', 'report')}.html")
        write_whole(target, render(records))
    print(f"{target}  ({len(records):,} records, {target.stat().st_size / 1e6:.1f} MB)")
    return 0
