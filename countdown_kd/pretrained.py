"""What a model's files tell without loading it: its config, its tokenizer, how long its prompts are. Imports no torch.

Files are looked for in the model's folder and in the hub's cache. Of a model that is in neither nothing is known, and
nothing is asked of the hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from os.path import commonprefix
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]


def find(model: Mapping[str, Any], file: str) -> Path | None:
    """A file of the model that from_pretrained's arguments name; None where it is not here."""
    name = model.get("pretrained_model_name_or_path")
    if not isinstance(name, str):
        return None
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache  # takes 0.2 s, and local folders do not need it

    try:
        found = try_to_load_from_cache(name, file, revision=str(model.get("revision") or "main"))
    except ValueError:  # no name that the hub can have
        return None
    return Path(found) if isinstance(found, str) else None


def model_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json; empty where it is not here."""
    return _read(find(model, str(Path(model.get("subfolder") or "", "config.json"))))


def softcaps(model: Mapping[str, Any]) -> bool:
    """Whether the model does more to its logits than multiplying hidden states with weights."""
    config = model_config(model)
    config = {**config, **(config.get("text_config") or {}), **model}
    return bool(config.get("final_logit_softcapping"))


def is_byte_level(model: Mapping[str, Any]) -> bool | None:
    """Whether each token of the tokenizer stands for bytes of the text, as TRL asks; None where it is not here."""
    path = find(model, "tokenizer.json")
    if path is None:
        return False if find(model, "tokenizer.model") else None
    tokenizer = _read(path)
    return any("ByteLevel" in json.dumps(tokenizer.get(part)) for part in ("pre_tokenizer", "decoder"))


def _read(path: Path | None) -> dict[str, Any]:
    return _read_once(path, path.stat().st_mtime_ns) if path else {}


@cache
def _read_once(path: Path, changed: int) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # whoever loads it tells
        return {}
    return content if isinstance(content, dict) else {}


def token_counter(model: Mapping[str, Any], limit: int) -> Callable[[Messages, Messages], tuple[int, int]] | None:
    """A function of a prompt and its completion: how many tokens each has once the chat template has put them together.

    Where both together are shorter than ``limit`` bytes it returns (0, 0): no token is shorter than a byte. None where
    the model's tokenizer or template is not here, or is one that only transformers can apply.
    """
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    path, settings = find(model, "tokenizer.json"), _read(find(model, "tokenizer_config.json"))
    template_file = find(model, "chat_template.jinja")
    template = template_file.read_text(encoding="utf-8") if template_file else settings.get("chat_template")
    if path is None or not isinstance(template, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False} | how)
    try:
        template = environment.from_string(template)
    except jinja2.TemplateError:
        return None
    special = {key: value for key, value in settings.items() if key.endswith("_token")}
    special = {key: value["content"] if isinstance(value, dict) else value for key, value in special.items()}
    tokenizer = cache(lambda: Tokenizer.from_file(str(path)))  # a second for a large one, and mostly not needed

    def render(messages: Messages, ask: bool) -> str:
        return template.render(messages=messages, add_generation_prompt=ask, **special)

    @cache
    def around(roles: tuple[str, ...]) -> int:
        """How many bytes the template adds."""
        return len(render([{"role": role, "content": ""} for role in roles], True).encode())

    def count(prompt: Messages, completion: Messages) -> tuple[int, int]:
        messages = [*prompt, *completion]
        content = sum(len(message["content"].encode()) for message in messages)
        try:
            if content + around(tuple(message["role"] for message in messages)) < limit:
                return 0, 0
            asked = render(prompt, True)
            whole = render(messages, False) if completion else asked
        except (jinja2.TemplateError, TypeError):  # a template that wants what only transformers gives it
            return 0, 0
        cut = len(commonprefix((asked, whole)))
        ends = [end for _, end in tokenizer().encode(whole, add_special_tokens=False).offsets]
        own = sum(end <= cut for end in ends)  # as TRL cuts them apart
        return own, len(ends) - own

    return count
