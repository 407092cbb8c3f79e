"""Who says whether a response shows a concept: a pattern, a Python function, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from tqdm.auto import tqdm


QUESTION = (
    "Does the following response show this property: {concept}? Answer with one word, yes or no.\n\n<prompt>\n{prompt}\n</prompt>\n\n"
    "<response>\n{response}\n</response>"
)


def judge_from(name: str, concept: str, timeout: float = 60.0) -> Callable[[Sequence[tuple[str, str]]], list[bool]]:
    """A judge by its name.

    Args:
        name: `regex:PATTERN`, the place of a function of the response's text (`package.module:function`), or the address of an endpoint and a
            model's name there (`http://localhost:8000/v1#model`). The key for it is taken from `OPENAI_API_KEY`, if it is set.
        concept: What an endpoint is asked about.
        timeout: Of a request, seconds.

    Returns:
        A function from `(prompt, response)` texts to whether each shows the concept.

    Raises:
        ValueError: If the name is none of these, or the pattern or the function is not valid.
    """
    from ..readouts import Readout, Regex, TextFunction, TextReader

    if name.startswith(("http://", "https://")):
        address, _, model = name.partition("#")
        if not model:
            raise ValueError(f"The judge {name!r} names no model. Put it behind the address: {address}#MODEL.")
        return lambda texts: [
            _ask(address.rstrip("/") + "/chat/completions", model, concept, prompt, response, timeout)
            for prompt, response in tqdm(texts, desc="Judging")
        ]
    readout: Readout = Regex(name.removeprefix("regex:")) if name.startswith("regex:") else TextFunction(name)
    reader = readout.load()
    assert isinstance(reader, TextReader)
    return lambda texts: [bool(score) for score in reader.score([response for _, response in texts])]


def _ask(address: str, model: str, concept: str, prompt: str, response: str, timeout: float) -> bool:
    content = QUESTION.format(concept=concept, prompt=prompt, response=response)
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            said = str(json.load(answer)["choices"][0]["message"]["content"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"The judge at {address} gave no answer ({type(error).__name__}: {error}).") from error
    found = re.search(r"\b(yes|no)\b", said.lower())
    if found is None:
        raise ValueError(f"The judge at {address} said {said!r}. Expected yes or no.")
    return found[1] == "yes"
