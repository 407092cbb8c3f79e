"""What fails on one process ends them all, soon, and says why."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from shapedpo.checkpoints import last_whole_checkpoint
from tests.distributed import jobs
from tests.distributed.launches import ROOT
from tests.helpers import model_path


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]
MESSAGES = {
    "text": "nothing is known of",
    "score": "Concept 'scored': 4 of its scores on a batch of step 2 are not finite",
    "file": "Concept 'way': There is no file",
}


def seconds_since_failure(output: Path) -> float:
    return time.time() - float((output / "failed").read_text())


def test_the_launcher_ends_all(tmp_path):
    """torch's own, which accelerate's calls."""
    output = tmp_path / "out"
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [sys.executable, *start, "tests.distributed.failing", "text", str(model_path()), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert seconds_since_failure(output) < 60
    assert done.returncode != 0
    assert MESSAGES["text"] in done.stderr
    assert last_whole_checkpoint(output) == str(output / "checkpoint-1")  # what was saved before is whole


@pytest.mark.parametrize("kind", ["score", "file"])
def test_every_process_says_why(tmp_path, kind):
    """Without a launcher that ends the others, too: scores are checked together, and so is what is loaded."""
    output = tmp_path / "out"
    with jobs.server() as start:
        job = start(jobs.fail, 2, output, kind)
        for process in job.processes:
            process.join(timeout=280)
    assert seconds_since_failure(output) < 60
    for rank, process in enumerate(job.processes):
        assert process.exitcode not in (0, None)
        assert MESSAGES[kind] in job.log(rank)
