"""Filters on one row: what keeps it out of a data set, whatever the other rows are.

Each looks at a RowText and says why the row goes, or nothing. They stand in the order in which they are asked, the cheap and plain
ones first; the first that objects names the reason. Code blocks, overlong paragraphs and mixed languages in the reasoning are what
DeepSeek-R1 filtered its rejection-sampled data by (arXiv:2501.12948, section 2.3.3).
"""

import re
from collections.abc import Callable, Mapping

from data.clean_config import CleanConfig
from data.language import share_in
from data.rows import RowText
from data.scripts import foreign_share
from data.text import CLOSE, OPEN, grams, repeated_share

GRAM = 8
"""Words of an n-gram in which repetition is counted."""
FEW_WORDS = 40
"""A text of fewer words repeats nothing: its sums may be alike, as 5+3 and 5+4 are."""

_CANNOT = r"(?:can['’]?t|can ?not|couldn['’]t|could not|won['’]t|will not|do not|don['’]t|am unable|am not|must decline)"
_HELP = r"(?:help|assist|provide|answer|comply|fulfill|do (?:that|this)|create|write|engage|support|discuss|continue|generate)"
_REFUSAL = re.compile(
    r"^\W*(?:"
    rf"(?:(?:i['’]?m|i am|we are|we['’]re) )?(?:very |so |truly )?(?:sorry|afraid)\b[^.\n]{{0,40}}?\b(?:i|we) {_CANNOT}"
    rf"|(?:i['’]?m|i am) (?:not able|unable) to {_HELP}|(?:unfortunately,? )?i (?:{_CANNOT}|must decline to) {_HELP}"
    rf"|(?:unfortunately,? )?as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    rf"|(?:my apologies|i apologi[sz]e)[^.\n]{{0,40}}?\bi {_CANNOT}"
    r"|(?:很|非常)?(?:抱歉|对不起)[，, ]*(?:但)?我?(?:不能|无法|没有办法)|作为一个?(?:人工智能|AI|语言模型)"
    r"|es tut mir leid, (?:aber )?(?:ich kann|das kann ich) |je suis désolé[^.\n]{0,20} je ne peux pas|lo siento, (?:pero )?no puedo"
    r")",
    re.IGNORECASE,
)
_CUT = re.compile(
    r"(?:[,(\[{=–—]|(?<!-)-|(?<!\+)\+|\b(?:a|an|and|are|as|at|because|but|by|for|from|if|in|into|is|of|or|so|than|that|the|then|to|was"
    r"|were|when|where|which|with))\s*$"
)
"""How a text ends that was cut: in the middle of a clause, a sum or a bracket."""
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)", re.MULTILINE)
_PARAGRAPHS = re.compile(r"\n\s*\n")

Filter = Callable[[RowText, CleanConfig], str]
"""Why a row goes; empty if it stays."""


def malformed(row: RowText, config: CleanConfig) -> str:
    """Not text, nothing said, `<think>` not opened and closed once before an answer; with `format: think`, no reasoning at all."""
    if row.problem or row.completion is None:
        return row.problem
    opened, closed = row.completion.count(OPEN), row.completion.count(CLOSE)
    if opened > 1 or closed > 1 or (opened and closed and row.completion.find(CLOSE) < row.completion.find(OPEN)):
        return f"{opened} times {OPEN} and {closed} times {CLOSE}"
    if closed and not row.parts[1].strip():
        return f"nothing stands after {CLOSE}"
    return f"no {CLOSE}" if config.format == "think" and not closed else ""


def wrong_length(row: RowText, config: CleanConfig) -> str:
    """Characters of what the row teaches, outside of `min_chars` and `max_chars`."""
    found = len(row.taught)
    if found < config.min_chars:
        return f"{found} characters, fewer than {config.min_chars}"
    return f"{found} characters, more than {config.max_chars}" if found > config.max_chars else ""


def cut_off(row: RowText, config: CleanConfig) -> str:
    """A completion that ran into its token limit, or ends inside a fence, a reasoning, a formula or a clause."""
    text = row.completion
    if text is None or not config.cut_off:
        return ""
    if row.finish_reason in ("length", "abort"):
        return f"finish_reason is {row.finish_reason}"
    if OPEN in text and CLOSE not in text:
        return f"{CLOSE} is missing"
    if len(_FENCE.findall(text)) % 2:
        return "a code fence is open at the end"
    if text.count("\\[") > text.count("\\]") or text.count("$$") % 2:
        return "a formula is open at the end"
    boxed = text.rfind("\\boxed{")
    if boxed >= 0 and text.count("{", boxed) > text.count("}", boxed):
        return "\\boxed{ is open at the end"
    ending = _CUT.search(text[-40:])
    return f"ends with {ending[0].strip()!r}" if ending else ""


def refusal(row: RowText, config: CleanConfig) -> str:
    """An answer that begins by declining."""
    if row.completion is None or not config.refusals:
        return ""
    found = _REFUSAL.match(row.parts[1].lstrip()[:300])
    return f"{found[0].strip()!r}" if found else ""


def repetitive(row: RowText, config: CleanConfig) -> str:
    """A text that says the same again: the share of its 8-grams that stood before, in all of it or in its last third (a loop)."""
    found = row.taught_words
    if len(found) < FEW_WORDS:
        return ""
    all_of_it = grams(found, GRAM)
    share = max(repeated_share(all_of_it), repeated_share(all_of_it[-max(FEW_WORDS, len(all_of_it) // 3) :]))
    return f"{share:.0%} of its {GRAM}-grams are repeated" if share > config.max_repeated else ""


def mixed_language(row: RowText, config: CleanConfig) -> str:
    """Words in a script that neither the prompt nor formulas use; in a prompt, in more than one script beside Latin."""
    if config.max_foreign is None or row.completion is None:
        return ""
    share, which = foreign_share(row.completion, row.prompt, frozenset(config.scripts))
    return f"{share:.2%} of its letters, as in {which!r}" if share > config.max_foreign else ""


def wrong_language(row: RowText, config: CleanConfig) -> str:
    """Another language than the wanted one, by script and identifier, sentence by sentence (data/language.py)."""
    if config.language is None:
        return ""
    share = share_in(row.taught, config.language)
    return "" if share is None or share >= config.min_language else f"{share:.0%} of it is '{config.language}'"


def code_in_reasoning(row: RowText, config: CleanConfig) -> str:
    """A code block within the reasoning."""
    reasoning = row.parts[0]
    return "a fenced block" if config.code_in_reasoning == "reject" and reasoning and _FENCE.search(reasoning) else ""


def long_paragraph(row: RowText, config: CleanConfig) -> str:
    """A paragraph of the reasoning that is overlong; paragraphs end at an empty line."""
    reasoning = row.parts[0]
    if not reasoning or config.max_paragraph_chars is None or len(reasoning) <= config.max_paragraph_chars:
        return ""
    longest = max(map(len, _PARAGRAPHS.split(reasoning)))
    return f"{longest} characters" if longest > config.max_paragraph_chars else ""


FILTERS: Mapping[str, Filter] = {
    "format": malformed,
    "length": wrong_length,
    "cut_off": cut_off,
    "refusal": refusal,
    "repetition": repetitive,
    "mixed_language": mixed_language,
    "language": wrong_language,
    "code_in_reasoning": code_in_reasoning,
    "long_paragraph": long_paragraph,
}
"""Reason -> filter, in the order in which they are asked."""


def first_objection(row: RowText, config: CleanConfig) -> tuple[str, str] | None:
    """(reason, detail) of the first filter that objects, or None for a row that passes them all."""
    for reason, objects in FILTERS.items():
        detail = objects(row, config)
        if detail:
            return reason, detail
    return None
