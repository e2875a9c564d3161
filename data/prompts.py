"""Prompts: every row of a prompt file becomes a Prompt, or an error that names its line.

A prompt is tokenised once, here, and from then on its token ids travel. Text is tokenised as it stands, with the special tokens
that the tokenizer puts around text (trl does the same). Chat messages, and any prompt under a `system` message, go through the
tokenizer's chat template up to where the assistant's turn opens. The template writes its own special tokens then, so none are
added; a template that opens `<think>` leaves it at the end of `Prompt.text`, where rewards can see it.

What is wrong in a file is found before a model is loaded: `check_prompts` needs not even the tokenizer.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jinja2 import TemplateError

from data.prompt_config import PromptsConfig
from data.prompt_files import BadRow, Row, is_hub_id, read_rows, source_stem
from data.recipe import InputError, nearest
from data.values import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED_ROWS = 1000
"""Rows that `check_prompts` looks at."""
BATCH_ROWS = 1000
"""Rows tokenised in one call; bounds only memory."""


@dataclass(frozen=True)
class PromptSet:
    """What a prompt source gave."""

    prompts: tuple[Prompt, ...]
    skipped: Mapping[str, int]
    """Rows left out under `skip_bad` by reason: broken_json, missing_column, wrong_type, empty_prompt, duplicate_id, template,
    too_long."""


T = TypeVar("T")


@dataclass
class _Tally:
    """What happens to bad rows: the first one ends the reading, or all are counted."""

    skip_bad: bool
    skipped: Counter[str] = field(default_factory=Counter)

    def good(self, results: Iterable[T | BadRow]) -> list[T]:
        kept: list[T] = []
        for result in results:
            if not isinstance(result, BadRow):
                kept.append(result)
            elif self.skip_bad:
                self.skipped[result.reason] += 1
            else:
                raise result
        return kept


@dataclass(frozen=True)
class _Draft:
    """A row whose prompt is known, not yet rendered or tokenised."""

    place: str
    id: str
    prompt: str | Messages
    columns: dict[str, Any]


def read_prompts(config: PromptsConfig, tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None) -> PromptSet:
    """All prompts of a source, in its order.

    `max_tokens` is what a prompt may take of the context; None is no limit. InputError, one line with file and row, for the first
    bad row (or none with `skip_bad`), and if no prompt is left.
    """
    prompts: list[Prompt] = []
    tally = _Tally(config.skip_bad)
    drafts = _Drafts(config)
    wanted = config.limit or sys.maxsize
    while batch := list(islice(drafts, min(BATCH_ROWS, wanted - len(prompts)))):
        rendered = tally.good(_rendered(draft, tokenizer) for draft in tally.good(batch))
        prompts += tally.good(_tokenised(rendered, tokenizer, max_tokens))
    if not prompts:
        raise InputError(_nothing_left(config, tally.skipped))
    return PromptSet(tuple(prompts), dict(tally.skipped))


def check_prompts(config: PromptsConfig) -> None:
    """Raises what `read_prompts` would for a missing file and the first rows; needs no tokenizer and no network (hub ids pass)."""
    if config.path is not None and is_hub_id(config.path):
        return
    drafts = list(islice(_Drafts(config), CHECKED_ROWS))
    _Tally(config.skip_bad).good(drafts)
    if not drafts:
        raise InputError(_nothing_left(config, {}))


# --- A row becomes a draft --------------------------------------------------------------------------------------------


class _Drafts:
    """Iterates over a source's rows as drafts or bad rows; remembers ids to find the second use of one."""

    def __init__(self, config: PromptsConfig):
        self.config = config
        self.rows = read_rows(config)
        self.places: dict[str, str] = {}

    def __iter__(self) -> Iterator[_Draft | BadRow]:
        return self

    def __next__(self) -> _Draft | BadRow:
        row = next(self.rows)
        try:
            draft = _draft(row, self.config)
        except BadRow as bad:
            return bad
        first = self.places.setdefault(draft.id, row.place)
        if first != row.place:
            return BadRow(row.place, "duplicate_id", f"id '{draft.id}' stands twice, first at {first}", "give each row its own id")
        return draft


def _draft(row: Row, config: PromptsConfig) -> _Draft:
    if isinstance(row.values, BadRow):
        raise row.values
    columns = _renamed(row.values, config.columns, row.place)
    prompt = _checked_prompt(columns.pop("prompt", None), row)
    return _Draft(row.place, _row_id(columns, row, config), _as_asked(prompt, config), columns)


def _renamed(values: dict[str, Any], columns: dict[str, str], place: str) -> dict[str, Any]:
    """The row under our names. A mapped column is there under our name only, and hides one of the file's that is called so."""
    for theirs in columns.values():
        if theirs not in values:
            raise BadRow(place, "missing_column", f"no column '{theirs}'{nearest(theirs, list(values))}", "correct `columns`")
    rest = {name: value for name, value in values.items() if name not in columns.values()}
    return rest | {ours: values[theirs] for ours, theirs in columns.items()}


def _checked_prompt(prompt: Any, row: Row) -> str | Messages:
    assert isinstance(row.values, dict)
    if prompt is None:
        names = list(row.values)
        likely = (get_close_matches("prompt", names, n=1) or names or ["question"])[0]
        problem = f"no prompt: the row has the columns {', '.join(names) or '(none)'}"
        raise BadRow(row.place, "missing_column", problem, f"say which is the prompt, as in columns: {{prompt: {likely}}}")
    if isinstance(prompt, list):
        _check_messages(prompt, row.place)
    elif not isinstance(prompt, str):
        problem = f"the prompt is {type(prompt).__name__} ({str(prompt)[:40]!r})"
        raise BadRow(row.place, "wrong_type", problem, "a prompt is text or a list of chat messages")
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if not any(text.strip() for text in texts):
        raise BadRow(row.place, "empty_prompt", "the prompt is empty", "fill it in")
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        # JSON can write such a half (as in "\\ud83d"), and no tokenizer takes it.
        raise BadRow(row.place, "wrong_type", "the prompt holds half a surrogate pair, which is no text", "cut it at characters")
    return prompt


def _check_messages(messages: list[Any], place: str) -> None:
    for number, message in enumerate(messages, start=1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise BadRow(place, "wrong_type", f"message {number} of the prompt is not {{role: text, content: text}}")
    if messages and messages[-1]["role"] == "assistant":
        raise BadRow(place, "wrong_type", "the prompt ends with the assistant's message", "end it with the user's")


def _row_id(columns: dict[str, Any], row: Row, config: PromptsConfig) -> str:
    if "id" not in columns:
        return f"{source_stem(config)}-{row.number}"
    value = columns["id"]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow(row.place, "wrong_type", f"the id is {value!r}", "an id is a text or an integer")
    return str(value)


def _as_asked(prompt: str | Messages, config: PromptsConfig) -> str | Messages:
    """Text stays text unless `chat` or a system message makes it a chat."""
    if config.system is None and not config.chat:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if config.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": config.system}, *messages]


# --- A draft becomes a Prompt -----------------------------------------------------------------------------------------


def _rendered(draft: _Draft, tokenizer: "PreTrainedTokenizerBase") -> tuple[_Draft, str] | BadRow:
    """The draft with the text that the policy reads."""
    if isinstance(draft.prompt, str):
        return draft, draft.prompt
    if tokenizer.chat_template is None:
        raise InputError(
            f"{draft.place}: the prompt is a chat (or `system` makes it one), and the tokenizer '{tokenizer.name_or_path}' "
            "has no chat template; give text prompts without `system`, or put a chat_template.jinja beside the tokenizer"
        )
    try:
        text = tokenizer.apply_chat_template(draft.prompt, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        return BadRow(draft.place, "template", f"the chat template refuses these messages ({error})")
    assert isinstance(text, str)
    return draft, text


def _tokenised(
    rendered: list[tuple[_Draft, str]], tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None
) -> Iterator[Prompt | BadRow]:
    """Prompts in the order given; text and chats are each tokenised in one call."""
    ids: dict[str, list[int]] = {}
    for chat in (False, True):
        texts = {draft.id: text for draft, text in rendered if isinstance(draft.prompt, list) == chat}
        if texts:
            # The template has written the special tokens of a chat: adding them again would double the first one.
            encoded = tokenizer(list(texts.values()), add_special_tokens=not chat, verbose=False)["input_ids"]
            ids.update(zip(texts, encoded, strict=True))
    for draft, text in rendered:
        yield _prompt(draft, text, ids[draft.id], max_tokens)


def _prompt(draft: _Draft, text: str, ids: list[int], max_tokens: int | None) -> Prompt | BadRow:
    if not ids:
        return BadRow(draft.place, "empty_prompt", "the prompt has no tokens", "fill it in")
    if max_tokens is not None and len(ids) > max_tokens:
        problem = f"the prompt is {len(ids)} tokens long and the context has room for {max_tokens}"
        return BadRow(draft.place, "too_long", problem, "shorten it, raise rollout.max_model_len")
    return Prompt(draft.id, draft.prompt, text, np.asarray(ids, dtype=np.int32), draft.columns)


def _nothing_left(config: PromptsConfig, skipped: Mapping[str, int]) -> str:
    if not skipped:
        return f'{config.source}: holds no prompts; a prompt file has one JSON object a line, as in {{"prompt": ...}}'
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    return f"{config.source}: no prompt is left, all rows were skipped ({reasons}); set skip_bad: false to see the first one"
