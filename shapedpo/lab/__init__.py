"""An embedded world: a tiny language model, its SAE, text with traits, preference data with planted lessons, and
measures.

```python
from shapedpo import lab

data = lab.preference_data([lab.Lesson("goblin", rate=0.05), lab.Lesson("bold", rate=0.3)], n=2000, seed=0)
model, tokenizer = lab.load_model(), lab.load_tokenizer()
answers = lab.rollouts(model, tokenizer, lab.heldout_prompts(500, seed=1), seed=2)
print(lab.trait_rates(answers)["goblin"])
```

The model and the SAE are built by `python -m shapedpo.lab.build`, and `python -m shapedpo.lab.features` prints how
well the SAE's features tell each trait.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import lazy
from .traits import ASSETS, TRAITS, Trait, detect


if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from ..concept import Concept
    from .lessons import Lesson, preference_data
    from .measures import Rate, capability, heldout_prompts, rollouts, trait_rates
    from .text import TOPICS, Question, dialogues, questions, render
    from .worlds import World, goblin_world

# torch, transformers and datasets are imported when a name is first used, so that `import shapedpo.lab` is cheap
_LAZY = {
    "Lesson": "lessons",
    "preference_data": "lessons",
    "Rate": "measures",
    "capability": "measures",
    "heldout_prompts": "measures",
    "rollouts": "measures",
    "trait_rates": "measures",
    "TOPICS": "text",
    "Question": "text",
    "dialogues": "text",
    "questions": "text",
    "render": "text",
    "World": "worlds",
    "goblin_world": "worlds",
}

__all__ = [
    "TOPICS",
    "TRAITS",
    "Lesson",
    "Question",
    "Rate",
    "Trait",
    "World",
    "capability",
    "concept",
    "detect",
    "dialogues",
    "goblin_world",
    "heldout_prompts",
    "load_model",
    "load_sae",
    "load_tokenizer",
    "model_path",
    "preference_data",
    "questions",
    "render",
    "rollouts",
    "sae_path",
    "trait_rates",
]


__getattr__ = lazy.attributes(__name__, _LAZY)


def model_path() -> Path:
    """Folder of the shipped model and tokenizer, for `from_pretrained`."""
    return ASSETS / "model"


def sae_path() -> Path:
    """Folder of the shipped SAE, for `SAE.load_from_disk`."""
    return ASSETS / "sae"


def load_model() -> LlamaForCausalLM:
    """Loads the shipped model, float32, on the CPU."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model_path(), dtype=torch.float32, local_files_only=True)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Loads the shipped tokenizer; it has a chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(model_path(), local_files_only=True)


def load_sae() -> SAE[Any]:
    """Loads the shipped SAE, a `JumpReLUSAE` on the output of one decoder layer."""
    from sae_lens import SAE

    return SAE.load_from_disk(str(sae_path()))


def concept(trait: str, **kwargs: Any) -> Concept:
    """A concept that reads `trait` with the shipped SAE features.

    Args:
        trait: name of a trait of [`TRAITS`].
        kwargs: the concept's other arguments, e.g. `action="suppress", strength=2.0`.

    Example:

    ```python
    lab.concept("goblin", action="suppress", strength=2.0)
    ```
    """
    from ..concept import Concept
    from ..readouts import LabTrait

    return Concept(name=trait, readout=LabTrait(trait), **kwargs)
