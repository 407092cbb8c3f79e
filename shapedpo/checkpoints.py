"""Whole checkpoints: a run that is killed while it saves leaves half a folder, which must never be resumed from.

A checkpoint of ours ends with [`SEAL`], a list of its files and their sizes, which is written when all processes have written the
rest. One without it (of plain `DPOTrainer`) is judged by what its files say of themselves.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from trl import DPOTrainer

from .calibration import FILE_NAME
from .errors import UserError
from .files import replacing
from .openings import restored
from .processes import all_or_none


logger = get_logger(__name__)

SEAL = "checkpoint_files.json"
"""Name of the list of files, the last that is written into a checkpoint."""


class ResumableTrainer(DPOTrainer):
    """DPOTrainer that says of a checkpoint when it is whole, and resumes from no other."""

    _limit: int | None
    _to_push: str | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`]. What a subclass keeps in the checkpoint is taken over.

        `resume_from_checkpoint=True` means the newest checkpoint that is whole: one that a kill has left unfinished is passed over.

        Raises:
            ValueError: If the checkpoint is not whole, or does not fit the run.
        """
        with all_or_none():
            if resume_from_checkpoint is True and self.accelerator.is_main_process:
                resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir)) or True
        # One chooses for all: on a slow shared disk another process might not see the newest one yet.
        (resume_from_checkpoint,) = broadcast_object_list([resume_from_checkpoint])
        with all_or_none():
            if isinstance(resume_from_checkpoint, str | os.PathLike):
                check_checkpoint(resume_from_checkpoint)
                self._resume(Path(resume_from_checkpoint))
        self._before_training(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _resume(self, checkpoint: Path) -> None:
        """Take over what a checkpoint has beside what `Trainer` reads from it. No process may wait for another in it."""

    def _before_training(self, checkpoint: Any) -> None:
        """What is to be done when it is known what the run resumes from, if it does. All processes together."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` looks at `max_steps` after a step only: resumed from its last checkpoint, a run would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            unseal(folder)
        self._limit = self.args.save_total_limit
        with restored(self.args, "save_total_limit"):
            self.args.save_total_limit = None  # older ones go when this one is whole
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
        if self._to_push is not None:
            super()._push_from_checkpoint(self._to_push)
            self._to_push = None
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run_dir, self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._to_push = checkpoint_folder  # when it is whole

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with restored(self.args, "save_total_limit"):
            self.args.save_total_limit = getattr(self, "_limit", self.args.save_total_limit)
            super()._save(*args, **kwargs)  # the settings are written too, as the user gave them


def seal(folder: str | os.PathLike[str]) -> None:
    """Say that a checkpoint is whole, in one step. To be called when all processes have written their part."""
    folder = Path(folder)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    with replacing(folder / SEAL) as partial:
        partial.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1), encoding="utf-8")


def unseal(folder: str | os.PathLike[str]) -> None:
    """Say that a checkpoint is about to be written, where one of that name is there already."""
    (Path(folder) / SEAL).unlink(missing_ok=True)


def what_is_missing(folder: str | os.PathLike[str]) -> str | None:
    """What a checkpoint lacks to be whole; `None` if it is."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / SEAL).is_file():
        if (folder / FILE_NAME).is_file():
            return f"it has no {SEAL}, which is written last"
        if not (folder / TRAINER_STATE_NAME).is_file():
            return f"it has no {TRAINER_STATE_NAME}"
        damaged = (f"{path.name} is cut short" for path in _files(folder) if not _is_whole(path))
        return next(damaged, None)
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"its {SEAL} cannot be read"
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is not there" if found is None else f"{name} has {found:,} of {size:,} bytes"
    return None


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint that is whole, with a warning for each newer one that is not.

    Returns:
        Its folder; `None` if there is no checkpoint at all.

    Raises:
        ValueError: If there are checkpoints and none is whole.
    """
    folders = sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []
    found = []
    for folder in reversed([f for f in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(f).name)]):
        missing = what_is_missing(folder)
        if missing is None:
            return folder
        found.append(f"{folder!r}: {missing}")
        logger.warning(f"The checkpoint {folder!r} is passed over, as it is not whole: {missing}.")
    if found:
        raise UserError(f"No checkpoint in {str(output_dir)!r} is whole. {'; '.join(found)}. Start the run anew.")
    return None


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Raise `ValueError` unless a checkpoint that a user names is whole; the text says what it lacks."""
    if (missing := what_is_missing(folder)) is not None:
        raise UserError(
            f"The checkpoint {str(folder)!r} is not whole: {missing}. Was the run killed while it saved, or the folder copied in part? "
            "Resume from an earlier one; `resume_from_checkpoint=True` finds the last that is whole."
        )


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL and not path.name.endswith(".partial"):
            yield path


def _is_whole(path: Path) -> bool:
    """Whether a file ends where its own header or directory says. Others cannot tell."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except (SafetensorError, OSError):
            return False
    if path.suffix in (".pt", ".pth", ".bin"):  # zip archives of `torch.save`, whose directory is at their end
        return zipfile.is_zipfile(path)
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return False
    return True
