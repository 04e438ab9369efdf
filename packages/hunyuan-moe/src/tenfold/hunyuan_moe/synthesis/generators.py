"""What answers prompts: a transformers model in this process, or a server with OpenAI's interface."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Generate = Callable[[Sequence[str]], list[str]]  # one answer to each prompt, in their order


class LocalModel:
    """A text-generation model that transformers loads.

    The same prompts get the same answers: every call seeds the sampling by its prompts.

    Args:
        name: a folder, or a name on the Hub.
        max_new_tokens: of an answer.
        temperature: of the sampling; 0 is greedy.
        device: where it runs; by default the accelerator, if there is one.
    """

    def __init__(
        self, name: str | Path, *, max_new_tokens: int = 512, temperature: float = 0.7, device: str | None = None
    ):
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if device is None:
            device = (
                str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
            )
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
        self.sampling = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.sampling["temperature"] = temperature

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Answer the prompts in one batch, by the tokenizer's chat template where it has one."""
        texts = [self._chat(prompt) for prompt in prompts]
        chat = self.tokenizer.chat_template is not None
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
        inputs = {
            name: x.to(self.model.device) for name, x in inputs.items() if name in ("input_ids", "attention_mask")
        }
        digest = hashlib.sha256("\0".join(prompts).encode()).digest()
        with torch.random.fork_rng():
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            out = self.model.generate(**inputs, **self.sampling, pad_token_id=self.tokenizer.pad_token_id)
        answers = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def greedy(self) -> "LocalModel":
        """The same model without sampling; the weights are shared."""
        other = copy(self)
        other.sampling = {"max_new_tokens": self.sampling["max_new_tokens"], "do_sample": False}
        return other

    def _chat(self, prompt: str) -> str:
        if self.tokenizer.chat_template is None:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class Server:
    """A server that answers `POST <url>/chat/completions` as OpenAI's does: vLLM, SGLang, llama.cpp and others.

    A key, if one is needed, comes from the environment variable OPENAI_API_KEY.

    Args:
        url: up to and without `/chat/completions`: `http://localhost:8000/v1`.
        model: its name there.
        max_new_tokens: of an answer.
        temperature: of the sampling.
        attempts: for each prompt, when the server is busy or cannot be reached; the waits double from a second.
        timeout: of an attempt, in seconds.

    Raises:
        ValueError: not an http address; on calls, a server that refuses or does not answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        attempts: int = 5,
        timeout: float = 300.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"server: expected an http address, got {url!r}")
        self.url = url.rstrip("/") + "/chat/completions"
        self.body = {"model": model, "max_tokens": max_new_tokens, "temperature": temperature}
        self.attempts, self.timeout, self.first_wait = attempts, timeout, 1.0

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Ask for all answers at once; the server batches."""
        with ThreadPoolExecutor(max_workers=max(1, len(prompts))) as pool:
            return list(pool.map(self._ask, prompts))

    def _ask(self, prompt: str) -> str:
        body = {**self.body, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(self.attempts):
            try:
                request = Request(self.url, json.dumps(body).encode(), headers)
                with urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)["choices"][0]["message"]["content"].strip()
            except HTTPError as error:
                if error.code != 429 and error.code < 500:
                    raise ValueError(f"server: {self.url} answered {error.code} {error.reason}") from error
                problem = f"answered {error.code} {error.reason}"
            except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
                problem = str(getattr(error, "reason", error))
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                raise ValueError(f"server: {self.url} did not answer as a chat completion does") from error
            if attempt + 1 < self.attempts:
                time.sleep(self.first_wait * 2**attempt)
        raise ValueError(f"server: {self.url}, after {self.attempts} attempts: {problem}")
