"""Rows for supervised fine-tuning: what is read before the assistant's turn, and the turn itself.

A row is {prompt, completion}, both text or both lists of chat messages, or {messages}, as Records are. Of a text a tool may have
written a part: `tool_spans`, [[begin, end], …] in characters of the completion, is read and not learned. Rows come from files or
from a built-in task's demonstrator, and are read and checked in full before a policy is loaded, so that a bad row is a line with its
place and not a stack trace in the middle of a run. Imports nothing heavy.
"""

from typing import Any

from data.arithmetic import demonstrations
from data.prompt_config import PromptsConfig
from data.prompt_files import BadRow, Row, read_rows
from data.recipe import InputError
from sft.config import SftRecipe, SourceConfig


def load_rows(recipe: SftRecipe) -> list[dict[str, Any]]:
    """All rows of the recipe's `data`; raises InputError for a file or a row that cannot be trained on."""
    sources: list[SourceConfig] = [*recipe.data.sources] or [recipe.data]
    rows: list[dict[str, Any]] = []
    for source in sources:
        seen = (recipe.sft.steps or 0) * recipe.sft.batch_size
        rows += _rows_of(source, seen, recipe.run.seed)
    forms = {_form(row) for row in rows}
    if len(forms) > 1:
        name = recipe.data.path or "data.sources"
        raise InputError(f"{name}: some prompts are text and some are chats; give all rows one form, or set chat: true")
    return rows


def _rows_of(source: SourceConfig, seen: int, seed: int) -> list[dict[str, Any]]:
    if source.task is not None:
        rows = demonstrations(source.options, source.rows or seen, seed)
    else:
        rows = [_checked(row) for row in read_rows(PromptsConfig(path=source.path))]
        if not rows:
            raise InputError(f"{source.path}: holds no rows; each needs a prompt and a completion")
    return [_as_chat(row) for row in rows] if source.chat else rows


def _form(row: dict[str, Any]) -> str:
    return "text" if isinstance(row.get("prompt"), str) else "chat"


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    if _form(row) == "chat":
        return row
    if "tool_spans" in row:
        raise InputError("data.chat: a completion that a tool wrote in part (tool_spans) has no form as a chat; set chat: false")
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}


def _checked(row: Row) -> dict[str, Any]:
    if isinstance(row.values, BadRow):
        raise InputError(f"{row.place}: {row.values.reason}: not a JSON object in UTF-8; correct or remove it")
    if row.values.get("messages") is not None:
        return {"messages": _chat(row.place, "messages", row.values["messages"], ends="assistant")}
    for name in ("prompt", "completion"):
        value = row.values.get(name)
        if not value or not isinstance(value, str | list):
            shown = repr(value) if name in row.values else "missing"
            raise InputError(f"{row.place}: {name} is {shown}; it must be text or a list of chat messages")
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise InputError(f"{row.place}: prompt and completion must both be text or both lists of chat messages")
    if isinstance(prompt, str):
        spans = row.values.get("tool_spans")
        return {"prompt": prompt, "completion": completion} | ({"tool_spans": _spans(row.place, spans, completion)} if spans else {})
    if len(completion) != 1:
        raise InputError(f"{row.place}: the completion has {len(completion)} messages; give it one, or the whole chat as `messages`")
    return {"prompt": _chat(row.place, "prompt", prompt), "completion": _chat(row.place, "completion", completion, ends="assistant")}


def _spans(place: str, spans: Any, completion: str) -> list[list[int]]:
    try:
        pairs = [[int(begin), int(end)] for begin, end in spans]
    except (TypeError, ValueError):
        pairs = [[-1, -1]]
    flat = [0, *(edge for pair in pairs for edge in pair), len(completion)]
    if flat != sorted(flat):
        raise InputError(f"{place}: tool_spans is {spans!r:.60}; it must be [[begin, end], …] in characters of the completion, in order")
    return pairs


def _chat(place: str, name: str, messages: Any, ends: str | None = None) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: {name} is {messages!r:.60}; it must be a list of chat messages")
    for number, message in enumerate(messages, start=1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise InputError(f"{place}: message {number} of {name} is not {{role: text, content: text}}; correct or remove the row")
    if ends is not None and messages[-1]["role"] != ends:
        raise InputError(f"{place}: {name} ends with the {messages[-1]['role']}'s message; the last one is the {ends}'s, which is learned")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
