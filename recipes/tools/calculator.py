"""A conversation in which the policy may ask a calculator, and goes on with what it answers: `recipes/tool.yaml` names it.

    <think><calc>4821+9087</calc>13908</think><answer>13908</answer>
                                ^^^^^ written by the calculator: read by the policy, and never trained on

A turn ends at </calc>. What stands in the call is read as two whole numbers with a + or - between them and is never evaluated; anything
else is the policy's mistake and not the calculator's, and the answer to it is a question mark.
"""

import re

CALL = re.compile(r"<calc>(\d{1,18})([+-])(\d{1,18})</calc>$", re.ASCII)


async def calculator(generate, prompt):
    token_ids, mask = [], []
    while True:
        turn = await generate(token_ids, stop="</calc>")
        token_ids += turn.token_ids
        mask += [1] * len(turn.token_ids)
        if turn.stop is None:
            return token_ids, mask
        result = generate.encode(answer(turn.text))
        token_ids += result
        mask += [0] * len(result)


def answer(text: str) -> str:
    """What the calculator says to a text that ends with a call."""
    call = CALL.search(text)
    if call is None:
        return "?"
    a, sign, b = call.groups()
    return str(int(a) + int(b) if sign == "+" else int(a) - int(b))
