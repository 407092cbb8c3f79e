"""What a recipe's names stand for: a model, preference pairs, concepts; local, of the embedded lab, or on the hub.

Local paths are looked at before anything else: without a network the hub client retries for half a minute before it says
that it cannot find a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from .errors import UserError, as_user_error, suggest


if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict
    from trl import DatasetMixtureConfig, ScriptArguments

    from .concept import Concept


# How `load_dataset` calls the reader of a file, by the file's suffix (compressed files: by the suffix before).
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: it exists, begins like one, or ends like a data file."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or _builder(name) is not None


def _builder(name: str) -> str | None:
    path = Path(name)
    if path.suffix in _COMPRESSED:
        path = path.with_suffix("")
    return _BUILDERS.get(path.suffix)


# --- the model ---------------------------------------------------------------------------------------------------------


def sae_source(name: str) -> str:
    """Where an SAE is: `lab` is the one that ships. Recipes keep the name, so that they mean the same on another machine."""
    if name != "lab":
        return name
    from . import lab

    return str(lab.sae_path())


def model_source(name: str | None, option: str = "model_name_or_path") -> str:
    """What `from_pretrained` takes for a recipe's `model_name_or_path`.

    Args:
        name: A local folder, a name on the hub, or `lab`.
        option: What the user calls it, for the error.

    Raises:
        UserError: If there is none, or it is a path where nothing is.
    """
    if name is None:
        raise UserError(f"`{option}` is missing: a local folder, a name on the hub, or `lab`.")
    if name == "lab":
        from . import lab

        return str(lab.model_path())
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if looks_local(name):
        raise UserError(f"{option}: there is no folder {name!r}.")
    return name


# --- the data ----------------------------------------------------------------------------------------------------------


def load_preferences(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """The splits that a recipe names: by TRL's `datasets` (a mixture) if given, else by `dataset_name`.

    Raises:
        UserError: If nothing is named, or what is named is a path where nothing is.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from trl import get_dataset

    if mixture.datasets:
        for part in mixture.datasets:
            local = local_source(part.path)
            if local is not None and part.data_files is None:
                files = local["data_files"]
                if part.split not in files:
                    raise UserError(f"datasets: {part.path!r} has no split {part.split!r}; it has {', '.join(files)}.")
                part.path, part.data_files = local["path"], files
        with as_user_error(ValueError, FileNotFoundError, prefix="datasets: "):
            return _without_spare_prompt(get_dataset(mixture))
    name = script.dataset_name
    if name is None:
        raise UserError("There is no data: give `dataset_name`, or a list of `datasets` (a mixture).")
    if name.startswith("lab:"):
        return lab_preferences(name.removeprefix("lab:"))
    source = local_source(name) or {"path": str(Path(name).expanduser()) if looks_local(name) else name}
    prefix = f"dataset_name: cannot load {name!r}: "
    try:
        with as_user_error(ValueError, FileNotFoundError, ConnectionError, prefix=prefix):
            return _without_spare_prompt(
                load_dataset(**source, name=script.dataset_config, streaming=script.dataset_streaming)
            )
    except DatasetGenerationError as error:  # whose own text says only that there was one
        raise UserError(f"{prefix}{error.__cause__ or error}") from error


def _without_spare_prompt(splits: Any) -> Any:
    """Leave out a prompt that is text beside completions that are whole conversations and begin with it, as in Tulu 3's mixtures.

    TRL takes the prompt from the conversations then, but only where there is no such column (1.16: `DPOTrainer` adds text to a list).
    """
    for name, split in splits.items():
        row: dict[str, Any] = next(iter(split), {})
        if isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list):
            if row["chosen"] and row["chosen"][0].get("role") == "assistant":
                raise UserError(
                    "The prompt is text, and the completions are messages without it. Make the prompt messages too: "
                    '[{"role": "user", "content": ...}].'
                )
            splits[name] = split.remove_columns("prompt")
    return splits


def local_source(name: str) -> dict[str, Any] | None:
    """What `load_dataset` takes for a local path that it does not understand by itself.

    Args:
        name: A data file, or a folder made by `save_to_disk`.

    Returns:
        `path` (the name of a reader) and `data_files` (split to files), or `None` for anything else: names on the hub, and folders
        of data files, which `load_dataset` takes as they are.

    Raises:
        UserError: If `name` can only be a path and nothing is there, or it is a file that no reader takes.
    """
    path = Path(name).expanduser()
    if path.is_file():
        builder = _builder(name)
        if builder is None:
            raise UserError(f"Cannot tell how to read {name!r}: expected a file ending in {', '.join(_BUILDERS)}.")
        if path.stat().st_size == 0:
            raise UserError(f"The file {name!r} is empty. Expected preference pairs.")
        return {"path": builder, "data_files": {"train": [str(path)]}}
    if not path.exists():
        if looks_local(name):
            raise UserError(f"There is no file or folder {name!r}.")
        return None
    if (path / "dataset_dict.json").is_file():
        splits = {name: path / name for name in json.loads((path / "dataset_dict.json").read_text())["splits"]}
    elif (path / "state.json").is_file():
        splits = {"train": path}
    else:
        return None
    return {
        "path": "arrow",
        "data_files": {split: _arrow_files(part) for split, part in splits.items()},
    }


def _arrow_files(folder: Path) -> list[str]:
    """The files of a data set made by `save_to_disk`. `datasets` may have put caches beside them."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [str(folder / file["filename"]) for file in state["_data_files"]]


def lab_preferences(world: str) -> DatasetDict:
    """Preference pairs of a world of the lab, and a test split drawn with another seed.

    Args:
        world: A world's name, with its arguments as a query: `goblin_world` or `goblin_world?n=200&seed=1`.

    Raises:
        UserError: If there is no such world, or it takes no such argument.
    """
    from datasets import DatasetDict

    from .lab import worlds

    name, _, query = world.partition("?")
    known = [entry for entry in vars(worlds) if entry.endswith("_world")]
    if name not in known:
        raise UserError(
            f"dataset_name: the lab has no world {name!r}.{suggest(name, known)} It has {', '.join(known)}."
        )
    with as_user_error(ValueError, TypeError, prefix=f"dataset_name: lab:{world}: "):
        options = {key: int(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
        train = getattr(worlds, name)(**options)
        test = getattr(worlds, name)(**{**options, "seed": train.seed + 10_000, "n": max(train.n // 10, 1)})
        return DatasetDict(train=train.dataset(), test=test.dataset())


# --- the concepts ------------------------------------------------------------------------------------------------------


def concepts_from(source: Any) -> list[Concept]:
    """The concepts of a recipe's `concepts`: a list of mappings, or the path of a file with one.

    Raises:
        UserError: If one does not fit, or a file is not there or holds none.
    """
    if not isinstance(source, str | list):
        raise UserError(f"`concepts` must be a list of concepts or the path of a YAML file, got {source!r}.")
    from .concept import resolve_concepts

    with as_user_error(ValueError, TypeError, FileNotFoundError):
        return resolve_concepts(source)
