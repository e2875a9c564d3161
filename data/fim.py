"""Fill in the middle: some code rows become a prompt of prefix and suffix whose completion is the middle.

Prefix, suffix, middle (PSM) at a rate of 0.1 is what DeepSeek-V3 trains (arXiv:2412.19437, section 4.1): `begin prefix hole suffix
end` and then the middle. Both cuts are drawn uniformly over characters (arXiv:2207.14255); seed and row decide, nothing else.
"""

import random
import re
from typing import Any

from data.clean_config import FimConfig
from data.text import split_reasoning

_BLOCK = re.compile(r"^(```+|~~~+)[^\n`]*\n(.*?)^\1[ \t]*$", re.DOTALL | re.MULTILINE)
MOSTLY = 0.5
"""Share of an answer that must be code for its row to be a code row."""


def code_of(completion: str) -> str | None:
    """The code of a code row: the one fenced block that makes up most of the answer; None for any other row."""
    answer = split_reasoning(completion)[1].strip()
    blocks = _BLOCK.findall(answer)
    if len(blocks) != 1:
        return None
    code = blocks[0][1]
    return code if len(code) > 1 and len(code) >= MOSTLY * len(answer) else None


def psm(code: str, config: FimConfig, row_id: str) -> tuple[str, str]:
    """(prompt, completion): prefix + completion + suffix is the code, and the completion is never empty."""
    rng = random.Random(f"{config.seed} cut {row_id}")
    start, end = sorted(rng.sample(range(len(code) + 1), 2))
    begin, hole, finish = config.tokens
    return f"{begin}{code[:start]}{hole}{code[end:]}{finish}", code[start:end]


def fill_in_the_middle(values: dict[str, Any], config: FimConfig, row_id: str) -> dict[str, Any]:
    """The row, rewritten if it is a code row whose turn it is; `fim` says which. Code that holds one of the tokens stays as it is."""
    chosen = random.Random(f"{config.seed} choose {row_id}").random() < config.rate
    code = code_of(_completion(values)) if chosen else None
    if code is None or any(token in code for token in config.tokens):
        return values | {"fim": False}
    prompt, middle = psm(code, config, row_id)
    user, assistant = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": middle}]
    if "messages" in values:
        return values | {"messages": user + assistant, "fim": True}
    chat = not isinstance(values["prompt"], str)
    return values | {"prompt": user if chat else prompt, "completion": assistant if chat else middle, "fim": True}


def _completion(values: dict[str, Any]) -> str:
    """What a record or a row of prompt and completion teaches; nothing for a row of another shape, which stays as it is."""
    turn = values.get("messages") or (values.get("completion") if "prompt" in values else None)
    if isinstance(turn, str):
        return turn
    return turn[-1]["content"] if turn and turn[-1]["role"] == "assistant" else ""
