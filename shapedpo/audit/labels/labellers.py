"""Language models that name things: an OpenAI-compatible endpoint, or a Hugging Face model on this machine."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Protocol

from .prompts import BEGUN, SCHEMA


Message = dict[str, str]
"""`role` and `content`, as in chat completions."""

MAX_TOKENS = 300
"""Of an answer."""
MAX_THINKING_TOKENS = 4000
"""Of an answer and of what a reasoning model thinks before it."""


_FORMATS: list[dict[str, Any]] = [
    {"type": "json_schema", "json_schema": {"name": "label", "strict": True, "schema": SCHEMA}},
    {"type": "json_object", "schema": SCHEMA},  # llama-cpp-python
    {"type": "json_object"},
]
"""How servers are asked for nothing but the object, in the order in which it is tried."""


class LabellerError(ValueError):
    """The labeller does not answer, and trying again would not help; the text says why."""


class Labeller(Protocol):
    """A language model that answers a conversation. `name` is in the cache's keys."""

    name: str

    async def answer(self, messages: list[Message]) -> str: ...

    async def close(self) -> None: ...


def endpoint(name: str) -> tuple[str, str] | None:
    """The base URL and the model of what is named `URL#MODEL`, such as `http://localhost:8000/v1#Qwen/Qwen3-8B`; `None` of what is no URL.

    Raises:
        ValueError: If it names no model, or begins with another scheme than http or https.
    """
    if "://" not in name:
        return None
    url, _, model = name.partition("#")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The endpoint {name!r} must begin with http:// or https://.")
    if not model:
        raise ValueError(f"The endpoint {name!r} names no model. Put it behind the address: {url}#MODEL.")
    return url, model


class Endpoint:
    """Chat completions of an OpenAI-compatible server: OpenAI, vLLM, llama.cpp, Ollama and others.

    The `openai` client retries what may pass (connections, 408, 409, 429, 5xx) with growing waits, or as long as `Retry-After` says. A model
    that takes no temperature, or `max_completion_tokens` in place of `max_tokens`, as OpenAI's reasoning models do, is asked its way. The
    answer's schema goes along, so that small models write it too; a server that knows no schemas is asked without.

    Args:
        url: The API's base, such as `http://localhost:8000/v1`.
        model: Name of the model there.
        key: The API key; local servers want none.
        retries: How often a request is tried again.
        timeout: Seconds a request may take.

    Raises:
        ImportError: If the extra is not installed.
    """

    def __init__(self, url: str, model: str, key: str | None = None, retries: int = 6, timeout: float = 120.0) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError("An endpoint needs the `openai` client: pip install 'shapedpo[labels]'.") from error

        self.name, self.url = model, url
        self._errors, self._refused = openai.OpenAIError, openai.APIStatusError
        self._options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "response_format": _FORMATS[0]}
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=key or "none", max_retries=retries, timeout=timeout, organization="", project=""
        )

    async def answer(self, messages: list[Message]) -> str:
        """The model's answer; empty if what came is no text of a completion.

        Raises:
            LabellerError: If the server refuses, or still does not answer after the last retry.
        """
        try:
            found = await self._completion(messages)
        except self._errors as error:
            raise LabellerError(f"{self.url}, model {self.name}: {type(error).__name__}: {_said(error)}") from error
        except json.JSONDecodeError:  # the client leaves it as it is
            return ""
        choices = getattr(found, "choices", None)  # which the client does not check
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        content = getattr(message, "content", None)
        return content if isinstance(content, str) else ""

    async def _completion(self, messages: list[Message]) -> Any:
        while True:
            options = self._options  # as other requests have left them
            try:
                return await self._client.chat.completions.create(model=self.name, messages=messages, **options)  # type: ignore[arg-type]
            except self._refused as error:
                self._options = _without(options, error)

    async def close(self) -> None:
        await self._client.close()


def _said(error: Any) -> str:
    """An error's text and, where the client found no message in what the server sent, all of that."""
    body = getattr(error, "body", None)
    told = isinstance(body, dict) and isinstance(body.get("message"), str)
    return f"{error}: {str(body)[:1000]}" if body and not told else str(error)


def _without(options: dict[str, Any], error: Any) -> dict[str, Any]:
    """The options for a server that has refused one of them; raises its error if that is about something else."""
    refused = str(getattr(error, "param", None) or "").split(".")[0]
    if "response_format" in _said(error):  # not every server says which it was in so many words
        refused = "response_format"
    if refused not in options:
        raise error
    others = {name: value for name, value in options.items() if name != refused}
    if refused == "max_tokens":
        others["max_completion_tokens"] = MAX_THINKING_TOKENS
    elif refused == "response_format" and (left := _FORMATS[_FORMATS.index(options[refused]) + 1 :]):
        others[refused] = left[0]
    return others


class LocalModel:
    """A Hugging Face causal language model, run here, one answer after the other, the likeliest token each time.

    Args:
        model: A folder, or a name on the hub.
    """

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ...sources import model_source

        self.name = model
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_source(model))
        loaded: Any = AutoModelForCausalLM.from_pretrained(model_source(model), dtype="auto")
        self._model = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._turn = asyncio.Lock()

    async def answer(self, messages: list[Message]) -> str:
        """The model's answer."""
        async with self._turn:
            return await asyncio.to_thread(self._generate, messages)

    def _generate(self, messages: list[Message]) -> str:
        import torch

        from ...monitor.probe.rollouts import context_length

        if self._tokenizer.chat_template:
            text = self._rendered(messages)
        else:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
        text += BEGUN  # and a model that would think first, for longer than its answer may be, goes straight to it
        room = context_length(self._model) - MAX_TOKENS
        if room < MAX_TOKENS:
            raise LabellerError(
                f"{self.name} reads too little at a time ({room + MAX_TOKENS} tokens) to name anything."
            )
        ids = self._tokenizer(text, return_tensors="pt", add_special_tokens=not self._tokenizer.chat_template).input_ids
        ids = ids[:, -room:].to(self._model.device)
        with torch.inference_mode():
            found = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                stop_strings="}",
                tokenizer=self._tokenizer,
            )
        return BEGUN + str(self._tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    def _rendered(self, messages: list[Message]) -> str:
        """A conversation in the model's chat template; for one that knows no system message (Gemma 2), that goes before the user's."""
        import jinja2

        def render(conversation: list[Message]) -> str:
            return str(self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

        try:
            return render(messages)
        except jinja2.TemplateError:
            system, user, *rest = messages
            return render([{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest])

    async def close(self) -> None:
        """Nothing to close."""
