"""Every way of explaining a concept away, on every case: what it does to the target, to its neighbours and to capability.

    python -m benchmarks.case_studies [--case goblin ...] [--seeds 3] [--quick] [--finished]

The cases are those of Bergen et al., "Anatomy of Post-Training" (arXiv 2606.12360), in the lab. Each run takes about a minute of one core; all of them,
over three seeds, a night. Finished runs are kept in `benchmarks/results/runs/case-studies.jsonl`, so that a study that was cut off goes on, on any
machine, and the tables and figures are made anew of what is there after each. Writes `case-studies*.{md,csv,png}` to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Sequence

from benchmarks.folders import add_out, out_folder


NAMES = (
    "goblin",
    "safeguards",
    "links",
    "sycophancy",
    "formatting",
    "amplification",
    "gated amplification",
    "traits",
)
QUICK = ("goblin", "links")
SEEDS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.case_studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", nargs="+", choices=NAMES, default=NAMES, metavar="CASE", help=", ".join(NAMES))
    parser.add_argument("--method", nargs="+", help="these methods only")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 0")
    parser.add_argument("--quick", action="store_true", help="two cases and the main methods at a small size")
    parser.add_argument("--finished", action="store_true", help="no new runs: tables and figures of what is there")
    parser.add_argument("--fresh", action="store_true", help="make runs anew that are there")
    add_out(parser)
    options = parser.parse_args(arguments)

    from benchmarks.case_studies.methods import middle
    from benchmarks.case_studies.report import write
    from benchmarks.case_studies.study import beside, find, jobs, result
    from benchmarks.case_studies.table import Row, earlier, missing, rows
    from benchmarks.folders import CACHE

    out = out_folder(options, CACHE / "quick")
    cases = QUICK if options.quick and options.case == NAMES else options.case
    # all that is known is in the tables, whichever runs are asked for
    every = jobs(cases, 1, quick=True) if options.quick else jobs(NAMES, max(options.seeds, SEEDS))
    planned = [
        job
        for job in every
        if job.world in cases and job.seed < options.seeds and (not options.method or job.method in options.method)
    ]
    before = [] if options.quick else earlier(every)
    made = set()

    def tabulate() -> list[Row]:
        table = rows(every, find, before)
        write(table, missing(every, table), out)
        return table

    def report() -> None:
        from benchmarks.case_studies import dose
        from benchmarks.case_studies.figures import draw

        draw(tabulate(), out)
        if "goblin" in options.case:
            kept = [
                job
                for job in planned
                if job.world == dose.TARGET and job.seed == 0 and job.strength == middle(job.method)
            ]
            if kept and (found := dose.responses([*beside(kept[0]), *kept])):
                dose.draw(found, out / "case-studies-dose.png")

    failed = []
    for job in planned if not options.finished else ():
        for one in (*beside(job), job):
            if one not in made and (options.fresh or find(one) is None):
                try:
                    found = result(one, fresh=True)
                    print(f"{one}: {found['rates']['affected'].get(str(one.target), '')}", flush=True)
                except Exception:  # one run of a night must not end the others
                    traceback.print_exc()
                    failed.append(one)
            made.add(one)
        tabulate()
    report()
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(map(str, failed))}.")


if __name__ == "__main__":
    main()
