"""The verifiable instructions of IFEval (arXiv:2311.07911), each as a function of the answer and the instruction's arguments.

They count what the instruction names and nothing else. Where IFEval's own code and its text differ, the text counts.
"""

import json
import re
from collections.abc import Callable, Sequence

from data.language import LANGUAGES, share_in

_AT_LEAST, _LESS = "at least", "less than"


def _compares(count: int, wanted: int, relation: str) -> bool:
    if relation not in (_AT_LEAST, _LESS):
        raise ValueError(f"relation is {relation!r}; IFEval knows '{_AT_LEAST}' and '{_LESS}'")
    return count >= wanted if relation == _AT_LEAST else count < wanted


def _count(word: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _paragraphs(text: str, mark: str = r"\s?\*\*\*\s?") -> list[str]:
    return [part for part in re.split(mark, text) if part.strip()]


def existence(text: str, keywords: Sequence[str]) -> bool:
    return all(_count(word, text) for word in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compares(_count(keyword, text), frequency, relation)


def forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_count(word, text) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compares(text.lower().count(letter.lower()), let_frequency, let_relation)


def response_language(text: str, language: str) -> bool:
    if language not in LANGUAGES:
        raise ValueError(f"the language {language!r} is not known; known are {', '.join(LANGUAGES)}")
    return (share_in(text, language) or 0.0) > 0.8


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    sentences = re.findall(r"[^.!?。！？]*\w[^.!?。！？]*(?:[.!?。！？]+|\Z)(?=\s|\Z|[\"')\]])", re.sub(r"(?<=\d)\.(?=\d)", ",", text))
    return _compares(len(sentences), num_sentences, relation)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    return len(_paragraphs(text)) == num_paragraphs


def number_words(text: str, num_words: int, relation: str) -> bool:
    return _compares(len(_words(text)), num_words, relation)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = _paragraphs(text, r"\n\n+")
    if len(parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    words = _words(parts[nth_paragraph - 1])
    return bool(words) and words[0].lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str = "P.S.") -> bool:
    letters = [re.escape(letter) + r"\.?\s?" for letter in postscript_marker if letter.isalpha()]
    return re.search(r"(?:^|\n)\s*" + "".join(letters) + r"[:\s]*\S", text, re.IGNORECASE) is not None


def number_bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    return any(option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def highlighted_sections(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*[^*\n]+\*\*|\*[^*\n]+\*", text)
    return len([part for part in found if part.strip("*").strip()]) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"^\W*{re.escape(section_spliter)}\s*\d+", text, re.MULTILINE)) >= num_sections


def json_format(text: str) -> bool:
    inside = re.fullmatch(r"```(?:json)?\s*\n(.*)\n```", text, re.IGNORECASE | re.DOTALL)
    try:
        json.loads(inside[1] if inside else text)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    return any(found.strip() for found in re.findall(r"<<([^<>\n]+)>>", text))


def two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip('" \n').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compares(sum(word.isupper() for word in _words(text)), capital_frequency, capital_relation)


def english_capital(text: str) -> bool:
    return text.isupper()


def english_lowercase(text: str) -> bool:
    return text.islower()


def no_comma(text: str) -> bool:
    return "," not in text


KINDS: dict[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
