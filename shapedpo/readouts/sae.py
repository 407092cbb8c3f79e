"""Readout of sparse-autoencoder features, from any SAE that sae-lens loads."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from .base import Readout, check_pooling, register
from .sae_reader import SAEReader


if TYPE_CHECKING:
    from sae_lens import SAE


DTYPES = ("float32", "bfloat16", "float16")

# Loaders of sae-lens that read safetensors or plain numpy arrays. The others unpickle `.pt` files.
_SAFE_LOADERS = frozenset(
    {
        "sae_lens",
        "sparsify",
        "gemma_2",
        "gemma_2_transcoder",
        "gemma_3",
        "llama_scope",
        "llama_scope_r1_distill",
        "mntss_clt_layer_transcoder",
        "mwhanna_transcoder",
        "temporal",
    }
)


@register
@dataclass(frozen=True)
class SAEFeatures(Readout):
    """Activations of chosen features of a sparse autoencoder.

    The hook point, the width and the pre-processing come from the SAE's own configuration.

    Args:
        sae: A folder that sae-lens saved, the name of a release (or Hugging Face repository) that sae-lens knows, or `lab`, the one that
            ships with the package.
        features: Indices of the features to read, or `"all"`.
        sae_id: Which SAE of the release. Leave out for a folder.
        pooling: How a completion's tokens become one score: `"max"`, `"mean"`, or `"freq"`, the fraction of tokens on
            which the feature is active.
        hook_name: Where to read, if the SAE's metadata does not say or is wrong for the model.
        dtype: Type in which the SAE computes: `"float32"`, `"bfloat16"` or `"float16"`. Scores are float32 always.

    Raises:
        ValueError: If there are no features, one is repeated or negative, or pooling or dtype are unknown.

    Example:
        ```python
        SAEFeatures("gemma-scope-2b-pt-res-canonical", sae_id="layer_20/width_16k/canonical", features=[412, 77])
        ```
    """

    type: ClassVar[str] = "sae_features"

    sae: str
    features: Sequence[int] | Literal["all"]
    sae_id: str | None = None
    pooling: str = "max"
    hook_name: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sae", str(self.sae))
        object.__setattr__(self, "features", _check_features(self.features))
        check_pooling(self.pooling)
        if self.dtype not in DTYPES:
            raise ValueError(f"Unknown dtype {self.dtype!r} of the SAE. Choose one of {', '.join(DTYPES)}.")

    def load(self) -> SAEReader:
        """Load the SAE and keep what its watched features need.

        Raises:
            ValueError: If the SAE is not found its weights are pickled, a feature is outside it, or it has no hook.
        """
        return self.load_shared({})

    def load_shared(self, loaded: dict[Any, Any]) -> SAEReader:
        """The same, with an SAE that several readouts name read from disk, and where they need it whole held, once."""
        source = (self.sae, self.sae_id, self.dtype)
        if source not in loaded:
            loaded[source] = load_sae(*source)
        sae = loaded[source]
        if self.features != "all":
            outside = [index for index in self.features if index >= sae.cfg.d_sae]
            if outside:
                raise ValueError(
                    f"Feature {outside[0]} is outside the SAE {self._label}, which has {sae.cfg.d_sae} features "
                    f"(0 to {sae.cfg.d_sae - 1})."
                )
        metadata = sae.cfg.metadata
        hook_name = self.hook_name or metadata.hf_hook_name or metadata.hook_name
        if hook_name is None:
            raise ValueError(
                f"The metadata of the SAE {self._label} names no hook point. Pass `hook_name=`, for example "
                "'blocks.12.hook_resid_post'."
            )
        features = None if self.features == "all" else [int(index) for index in self.features]
        return SAEReader(sae, features, self.pooling, hook_name)

    @property
    def _label(self) -> str:
        return repr(self.sae) if self.sae_id is None else f"{self.sae!r} (sae_id {self.sae_id!r})"


def load_sae(sae: str, sae_id: str | None = None, dtype: str = "float32") -> SAE[Any]:
    """Load an SAE onto the CPU with sae-lens, from a folder or a release.

    A folder is looked for first: without a network, asking the hub for a local name would retry for half a minute.

    Raises:
        ValueError: If there is no such folder, release or `sae_id`, or its weights are pickled.
    """
    from ..sources import sae_source

    _import_sae_lens()
    sae = sae_source(sae)
    path = Path(sae).expanduser()
    if path.exists() or sae.startswith((".", "/", "~")):
        if sae_id is not None:
            path = path / sae_id
        return _load_folder(path, dtype)
    return _load_release(sae, sae_id, dtype)


def _import_sae_lens() -> None:
    """Import sae-lens, also where DeepSpeed's ZeRO-3 has loaded a model before.

    When `zero.Init` ends it leaves an `__init_subclass__` on torch's `Module` (seen in DeepSpeed 0.19.8), which hides that of
    `typing.Generic`, and no generic module class, such as sae-lens has, can be defined. It is laid aside for the import.
    """
    left = vars(nn.Module).get("__init_subclass__")
    if left is None or "sae_lens" in sys.modules:
        return
    del nn.Module.__init_subclass__
    try:
        import sae_lens  # noqa: F401
    finally:
        type.__setattr__(nn.Module, "__init_subclass__", left)


def _load_folder(path: Path, dtype: str) -> SAE[Any]:
    from sae_lens import SAE  # takes seconds to import
    from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

    if not path.is_dir():
        raise ValueError(f"There is no SAE folder '{path}'.")
    missing = [name for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME) if not (path / name).is_file()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"The folder '{path}' lacks {' and '.join(missing)}, so it is not an SAE saved by sae-lens (`save_model`). "
            f"It holds {found}."
        )
    try:
        sae = SAE.load_from_disk(path, device="cpu", dtype=dtype)
    except Exception as error:  # whatever a damaged or foreign file makes sae-lens stumble over
        raise ValueError(f"Cannot load the SAE in '{path}' ({type(error).__name__}: {error}).") from error
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        # sae-lens folds these into the weights when it saves a finished SAE; what is not folded, `encode` leaves out.
        warnings.warn(
            f"The SAE in '{path}' asks for normalize_activations={sae.cfg.normalize_activations!r}, but its folder "
            "holds no factor to scale by, so activations are read unscaled (as `sae.encode` does).",
            stacklevel=2,
        )
    return sae


def _load_release(release: str, sae_id: str | None, dtype: str) -> SAE[Any]:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release in directory:
        valid_ids = list(directory[release].saes_map)
        if sae_id not in valid_ids:
            raise ValueError(
                f"The release {release!r} has no SAE with sae_id {sae_id!r}. {_suggest(sae_id or '', valid_ids)}"
            )
    elif "/" not in release:
        raise ValueError(
            f"{release!r} is neither a folder nor a release that sae-lens knows. {_suggest(release, list(directory))}"
        )
    elif sae_id is None:
        raise ValueError(
            f"There is no folder {release!r}. If it is a Hugging Face repository, pass the SAE's folder in it as "
            "`sae_id=`."
        )
    loader = get_conversion_loader_name(release)
    if loader not in _SAFE_LOADERS:
        raise ValueError(
            f"The release {release!r} keeps its weights as pickles, which shapedpo does not load. If you trust them, "
            f"convert them once, `SAE.from_pretrained({release!r}, {sae_id!r}).save_model('folder')`, and pass the "
            "folder."
        )
    try:
        return SAE.from_pretrained(release, sae_id, device="cpu", dtype=dtype)
    except OSError as error:  # hub and network errors
        raise ValueError(
            f"Cannot download the SAE {sae_id!r} of {release!r}: {error} Without a network, download it beforehand and "
            "pass its folder."
        ) from error


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    if near:
        return f"Near matches: {', '.join(near)}."
    return f"It has {len(known)}, among them {', '.join(known[:5])}." if known else ""


def _check_features(features: Any) -> tuple[int, ...] | Literal["all"]:
    if isinstance(features, str):
        if features != "all":
            raise ValueError(f"`features` must be a list of indices or 'all', got {features!r}.")
        return "all"
    try:
        indices = tuple(features)
    except TypeError:
        raise ValueError(f"`features` must be a list of indices or 'all', got {features!r}.") from None
    if not indices:
        raise ValueError("`features` is empty. Name the features to read, or 'all'.")
    for index in indices:
        # numpy's integers have `__index__` too; bool is an int to Python, but no index
        if isinstance(index, bool) or not hasattr(index, "__index__") or index < 0:
            raise ValueError(f"A feature index must be a whole number from 0 up, got {index!r}.")
    repeated = [index for index, count in Counter(indices).items() if count > 1]
    if repeated:
        raise ValueError(f"Feature {repeated[0]} is listed more than once.")
    return tuple(int(index) for index in indices)
