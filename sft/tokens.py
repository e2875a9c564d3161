"""Rows as tokens: which a row has, and which of them are learned.

Learned is what an assistant wrote, with the token that ends its turn; what is read before is not. The prompt is tokenised as an
engine would see it (text as it stands, a chat up to where the assistant's turn opens), and what follows is tokenised by itself, so
that no token reaches over the place where sampling begins. What a tool wrote of a completion (`tool_spans`) is tokenised by itself as
well, as a conversation does it (`rl/conversation.py`), and not learned. A chat with several assistant turns needs a template that
marks them (`{% generation %}`, which trl brings for the templates it knows).

Rows longer than the context are refused by number, or left out and counted. None ever loses its end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data.recipe import InputError
from data.values import Messages

IGNORED = -100
"""Label of a token that is read and not learned, as torch's cross entropy has it."""

Ids = list[int]
Marked = Callable[[PreTrainedTokenizerBase], str]
"""A tokenizer's chat template with marks around what an assistant writes; ValueError where there is none."""


class NoneLeft(InputError):
    """All rows are longer than the context."""


@dataclass(frozen=True)
class TokenRows:
    """What training reads."""

    rows: list[dict[str, Ids]]
    """`input_ids`, and `labels` with IGNORED where nothing is learned."""
    skipped: int
    """Rows that were longer than the context."""
    longest: int
    """Tokens of the longest row that stays."""
    unknown: int
    """Tokens of these rows that stand for text which the tokenizer does not know."""


def tokenise(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None, too_long: str, marked: Marked
) -> TokenRows:
    """All rows in their order; InputError for one that is too long (with `refuse`) and where none is left."""
    kept, unknown = [], 0
    known = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    unk = None if tokenizer.unk_token_id in known else tokenizer.unk_token_id  # some have one token for all of these
    for number, row in enumerate(rows, start=1):
        try:
            ids, labels = _row(row, tokenizer, marked)
        except (TemplateError, ValueError) as error:
            raise InputError(f"data: row {number}: {' '.join(str(error).split())}") from None
        if max_length is None or len(ids) <= max_length:
            kept.append({"input_ids": ids, "labels": labels})
            unknown += ids.count(unk) if unk is not None else 0
        elif too_long == "refuse":
            raise InputError(
                f"data: row {number} has {len(ids)} tokens and there is room for {max_length}; shorten it, raise sft.max_length up to "
                "the policy's context, or set sft.too_long=skip"
            )
    if not kept:
        raise NoneLeft(f"data: all {len(rows)} rows are longer than {max_length} tokens; raise sft.max_length")
    return TokenRows(kept, len(rows) - len(kept), max(len(row["input_ids"]) for row in kept), unknown)


def unknown_line(unknown: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What to say of text that a tokenizer does not know."""
    return f"{unknown:,} tokens are {tokenizer.unk_token}: text that this tokenizer does not know, and that is lost to the policy"


def _row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, marked: Marked) -> tuple[Ids, Ids]:
    """Token ids and labels of one row; ValueError or TemplateError where the chat template does not fit it."""
    if isinstance(row.get("prompt"), str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids, labels = _written(row["completion"], row.get("tool_spans", []), tokenizer)
        ended = _ended(ids, tokenizer)
        return prompt + ended, [IGNORED] * len(prompt) + (labels + ended[len(ids) :])[: len(ended)]
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    if "messages" in row and sum(message["role"] == "assistant" for message in messages) > 1:
        return _every_turn(messages, tokenizer, marked(tokenizer))
    opened = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(opened, str) and isinstance(whole, str)
    if not whole.startswith(opened):
        raise ValueError(f"the chat template writes a finished turn otherwise than it opens one ({opened[-40:]!r} does not begin it)")
    return _joined(_plain(opened, tokenizer), _ended(_plain(whole[len(opened) :], tokenizer), tokenizer))


def _written(text: str, tool_spans: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """Token ids and labels of a completion of which a tool wrote these spans."""
    ids, labels, at = Ids(), Ids(), 0
    for begin, end in [*tool_spans, [len(text), len(text)]]:
        own, tools = _plain(text[at:begin], tokenizer), _plain(text[begin:end], tokenizer)
        ids += own + tools
        labels += own + [IGNORED] * len(tools)
        at = end
    return ids, labels


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Without the special tokens that a tokenizer puts around a text: a template has written its own."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _joined(prompt: Ids, learned: Ids) -> tuple[Ids, Ids]:
    return prompt + learned, [IGNORED] * len(prompt) + learned


def _ended(learned: Ids, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """With one end-of-text token, as its last: what a template writes behind it no engine ever samples."""
    end = tokenizer.eos_token_id
    if end not in learned:
        return [*learned, end]
    return learned[: len(learned) - learned[::-1].index(end)]


def _every_turn(messages: Messages, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[Ids, Ids]:
    """Every assistant turn by the template's marks."""
    found = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marks = found["input_ids"], found["assistant_masks"]
    return ids, [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]
