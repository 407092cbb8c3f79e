"""Who says whether a response shows a concept: a pattern, a Python function, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Sequence

from tqdm.auto import tqdm

from ..audit.labels.labellers import Endpoint, endpoint
from ..readouts import Readout, Regex, TextFunction, TextReader


QUESTION = (
    "Does the following response show this property: {concept}? Answer with one word, yes or no.\n\n<prompt>\n{prompt}\n</prompt>\n\n"
    "<response>\n{response}\n</response>"
)
TOGETHER = 8
"""Requests that are under way at once."""


def judge_from(name: str, concept: str, retries: int = 6) -> Callable[[Sequence[tuple[str, str]]], list[bool]]:
    """A judge by its name.

    Args:
        name: `regex:PATTERN`, the place of a function of the response's text (`package.module:function`), or the address of an endpoint and a
            model's name there (`http://localhost:8000/v1#model`). The key for it is taken from `OPENAI_API_KEY`, if it is set.
        concept: What an endpoint is asked about.
        retries: How often a request to it is tried again.

    Returns:
        A function from `(prompt, response)` texts to whether each shows the concept.

    Raises:
        ValueError: If the name is none of these, or the pattern or the function is not valid.
    """
    if not name.startswith("regex:") and (place := endpoint(name)) is not None:
        return lambda texts: asyncio.run(_ask(*place, concept, texts, retries))
    if not name.startswith("regex:") and ":" not in name:
        raise ValueError(f"The judge {name!r} is none of regex:PATTERN, package.module:function and URL#MODEL.")
    readout: Readout = Regex(name.removeprefix("regex:")) if name.startswith("regex:") else TextFunction(name)
    reader = readout.load()
    assert isinstance(reader, TextReader)
    return lambda texts: [bool(score) for score in reader.score([response for _, response in texts])]


async def _ask(address: str, model: str, concept: str, texts: Sequence[tuple[str, str]], retries: int) -> list[bool]:
    try:
        server = Endpoint(address, model, os.environ.get("OPENAI_API_KEY"), retries)
    except ImportError as error:
        raise ValueError(str(error)) from error
    turns, bar = asyncio.Semaphore(TOGETHER), tqdm(total=len(texts), desc="Judging")

    async def one(prompt: str, response: str) -> bool:
        content = QUESTION.format(concept=concept, prompt=prompt, response=response)
        async with turns:
            said = await server.answer([{"role": "user", "content": content}])
        bar.update()
        found = re.search(r"\b(yes|no)\b", said.lower())
        if found is None:
            raise ValueError(f"The judge at {address} said {said!r}. Expected yes or no.")
        return found[1] == "yes"

    try:
        return list(await asyncio.gather(*(one(*text) for text in texts)))
    finally:
        bar.close()
        await server.close()
