"""The `clean` section of a recipe, and what `data.clean` takes as `key=value`: which rows go."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from data.language import LANGUAGES
from data.recipe import Section, nearest
from data.scripts import SCRIPTS


class NearConfig(Section):
    """Near duplicates: the Jaccard similarity of word pairs, exactly, of what MinHash proposes (data/near.py)."""

    threshold: float = Field(0.8, gt=0.0, le=1.0)
    """Similarity from which two rows are one."""
    same_answer: float = Field(0.5, gt=0.0, le=1.0)
    """The same where both have one gold answer that is rare in the data; rows with different gold answers are never one."""


class AgainstConfig(Section):
    """Decontamination: evaluation files of which nothing may be in the data (data/decontaminate.py)."""

    paths: list[str] = Field(min_length=1)
    """JSONL, JSON or parquet files; their prompts are what is looked for."""
    ngram: int = Field(8, ge=2)
    """Words of an n-gram. A prompt of fewer words is looked for whole."""
    coverage: float = Field(0.5, gt=0.0, le=1.0)
    """A row is a hit that has at least this share of an evaluation prompt's n-grams."""
    allow: str | None = None
    """A text file, one entry a line: the id of an evaluation row, or text whose n-grams do not count (a phrase that all use)."""


class FimConfig(Section):
    """Fill-in-the-middle rewriting of code rows, prefix-suffix-middle (arXiv:2412.19437, section 4.1)."""

    rate: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the code rows that is rewritten."""
    tokens: tuple[str, str, str] = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    """What stands before the prefix, the suffix and the middle; DeepSeek's by default."""
    seed: int = 0
    """Which rows, and where they are cut."""


class CleanConfig(Section):
    """Which rows go. What is null is not asked."""

    format: Literal["any", "think"] = "any"
    """think: a completion is a reasoning in `<think>…</think>` and an answer after it."""
    min_chars: int = Field(1, ge=0)
    """Fewest characters of a completion, or of the prompt of a row that has none."""
    max_chars: int = Field(200_000, ge=1)
    """Most characters of the same."""
    cut_off: bool = True
    """Rejects completions that were cut: by finish_reason, or by how they end."""
    refusals: bool = True
    """Rejects answers that begin by declining."""
    max_repeated: float = Field(0.5, ge=0.0, le=1.0)
    """Largest share of 8-grams that stood before, in texts of at least 40 words."""
    max_foreign: float | None = Field(0.0, ge=0.0, le=1.0)
    """Largest share of a completion's letters in scripts other than Latin and those of its prompt."""
    scripts: list[str] = []
    """Scripts that are at home too, as Unicode names them: Han, Cyrillic, …"""
    language: str | None = None
    """Wanted language of what a row teaches, as `en`; slow, as a language identifier reads every sentence."""
    min_language: float = Field(0.8, gt=0.0, le=1.0)
    """With `language`: smallest share of the text that is in it."""
    code_in_reasoning: Literal["reject", "keep"] = "reject"
    """Code blocks between `<think>` and `</think>`."""
    max_paragraph_chars: int | None = Field(4000, ge=1)
    """Longest paragraph of a reasoning."""
    exact: bool = True
    """Of rows with the same text but for white space, one stays."""
    near: NearConfig | None = NearConfig()
    against: AgainstConfig | None = None
    fim: FimConfig | None = None

    @field_validator("scripts")
    @classmethod
    def _known_scripts(cls, scripts: list[str]) -> list[str]:
        for name in scripts:
            if name not in SCRIPTS:
                raise ValueError(f"no script named '{name}'{nearest(name, SCRIPTS)}")
        return scripts

    @field_validator("language")
    @classmethod
    def _known_language(cls, language: str | None) -> str | None:
        if language is not None and language not in LANGUAGES:
            raise ValueError(f"no language '{language}'{nearest(language, LANGUAGES)}")
        return language

    @model_validator(mode="after")
    def _possible_length(self) -> Self:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is more than max_chars {self.max_chars}: nothing could stay")
        return self
