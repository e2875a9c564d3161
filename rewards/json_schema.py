"""`json_schema`: 1 if the answer is JSON that a schema accepts, 0 otherwise.

The JSON is the last fenced block after the reasoning, else what is marked as the answer, else all of the text. The schema is an
option, or the row's column `schema`. What is no valid schema is an error of the row, not of the answer."""

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
from referencing import Registry

from data.values import Messages
from rewards.answers import marked_answer
from rewards.text import answer_text, completion_text, last_block, per_completion


def json_schema(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    prompt_texts: list[str] | None = None,
    schema: Mapping[str, Any] | list[Any] | None = None,
    **_: Any,
) -> list[float | None]:
    """Rewards 1.0, 0.0, or None where a row has no schema."""
    rewards: list[float | None] = []
    for index, prompt_text in enumerate(per_completion(prompt_texts, len(prompts))):
        wanted = schema[index] if isinstance(schema, list) else schema
        wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
        after = answer_text(completion_text(completions[index]), prompt_text)
        rewards.append(None if wanted is None else float(after is not None and accepts(wanted, after)))
    return rewards


def accepts(schema: Mapping[str, Any], text: str) -> bool:
    """Whether a text's JSON is valid; jsonschema's SchemaError for a schema that is none. References outside it are not fetched."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    try:
        value = json.loads(json_text(text), parse_constant=_refuse)
        return kind(schema, registry=Registry()).is_valid(value)
    except (ValueError, RecursionError):  # nested deeper than it can be read or followed
        return False


def json_text(text: str) -> str:
    """The part of an answer that is meant as JSON."""
    block = last_block(text)
    if block is not None:
        return block
    is_marked, marked = marked_answer(text)
    return (marked or "") if is_marked and "<answer>" in text else text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
