"""A recipe's model and data, for the commands that make and judge readouts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import UserError, as_user_error
from ..sources import load_preferences, model_source
from .recipe import read_recipe
from .train import parse


if TYPE_CHECKING:
    from datasets import Dataset
    from sae_lens import SAE

    from ..readouts.responses import Response


class Setting(NamedTuple):
    """What a recipe says of model and data.

    Attributes:
        model: Folder or hub name.
        dtype: Of the model's weights.
        train: Pairs to train an SAE on.
        heldout: Pairs to check on: the test split, or every twentieth pair where there is none.
        sae: The SAE that the recipe watches (release or folder, and `sae_id`).
        args: The trainer's arguments.
    """

    model: str
    dtype: str
    train: Dataset
    heldout: Dataset
    sae: tuple[str | None, str | None]
    args: Any

    @classmethod
    def read(cls, config: str, overrides: Sequence[str]) -> Setting:
        """Read a recipe, with the command line's changes.

        Raises:
            UserError: If the recipe is at fault, or streams its data.
        """
        script, args, model, mixture = parse(read_recipe(config), overrides)
        splits = load_preferences(script, mixture)
        if script.dataset_streaming:
            raise UserError("This needs the data whole: set dataset_streaming to false.")
        if script.dataset_train_split not in splits:
            raise UserError(f"dataset_train_split: the data has no split {script.dataset_train_split!r}.")
        train = splits[script.dataset_train_split]
        if script.dataset_test_split in splits:
            heldout = splits[script.dataset_test_split]
        else:
            heldout = train.select(range(0, len(train), 20))
            train = train.select([row for row in range(len(train)) if row % 20])
        dtype = (model.dtype or "auto") if torch.cuda.is_available() else "float32"
        watched = (args.monitor_sae, args.monitor_sae_id)
        return cls(model_source(model.model_name_or_path), dtype, train, heldout, watched, args)

    @property
    def n_layers(self) -> int:
        """How many decoder layers the model has, by its configuration."""
        from transformers import AutoConfig

        with self._loading():
            return int(AutoConfig.from_pretrained(self.model).get_text_config().num_hidden_layers)

    def tokenizer(self) -> Any:
        """The model's tokenizer, with padding as TRL sets it."""
        from transformers import AutoTokenizer

        with self._loading():
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def load_model(self) -> Any:
        """The model: on the GPUs of this machine, over several where one is too small, or on the CPU."""
        from transformers import AutoModelForCausalLM

        where = "auto" if torch.cuda.is_available() else "cpu"
        with self._loading():
            return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype, device_map=where)

    def _loading(self) -> AbstractContextManager[None]:
        return as_user_error(OSError, ValueError, prefix=f"The model {self.model!r} cannot be loaded: ")

    def load_sae(self, name: str | None, sae_id: str | None) -> SAE[Any]:
        """The SAE of that name, or the one that the recipe watches."""
        from ..readouts.sae import load_sae

        if name is None:
            name, sae_id = self.sae
        if name is None:
            raise UserError("Which SAE? Give --sae (a folder or a release), or `monitor_sae` in the recipe.")
        with as_user_error(ValueError):
            return load_sae(name, sae_id)

    def responses(self, rows: Dataset, pairs: int) -> list[Response]:
        """Both completions of the first so many pairs, drawn with the run's seed."""
        from ..readouts.responses import pair_responses

        return list(pair_responses(rows.shuffle(seed=self.args.seed).select(range(min(pairs, len(rows))))))
