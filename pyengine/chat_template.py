"""Chat templates: Jinja programs that come with a model, so they run in a sandbox and may fail in any way."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import CheckpointError


def render(template: str, **values: Any) -> str:
    """The text of a template for messages, add_generation_prompt and the special tokens by name; ValueError where it fails."""
    try:
        return _compile(template).render(**values)
    except Exception as e:  # a template is a program: it may raise anything
        raise ValueError(f"the chat template failed: {type(e).__name__}: {e}") from e


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    # Jinja's own tojson escapes < and > for web pages.
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **({"ensure_ascii": False} | options))
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def read_template(path: Path, config: dict[str, Any]) -> str | None:
    """The default template of a checkpoint directory, from its own file or from tokenizer_config.json; None for a base model."""
    if (path / "chat_template.jinja").is_file():
        try:
            return (path / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"chat_template.jinja: {e}") from e
    found = config.get("chat_template")
    named = found if isinstance(found, list) else [{"name": "default", "template": found}]
    template = next((t.get("template") for t in named if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(template, (str, type(None))):
        raise CheckpointError(f"tokenizer_config.json: chat_template is {template!r}, expected a string")
    return template
