"""Whether the learner's log-probs are those that a policy's own forward gives.

The learner runs the decoder over a flat batch in which completions share their prompt, and the output head alone behind it. For an
architecture that does more (scales or caps its logits, caps attention scores, lets tokens meet in a convolution or a linear attention)
that would be another model, whose log-probs are wrong without any error. So a policy is asked before it is trained, once, on a prompt
and two completions of random tokens.
"""

import numpy as np
import torch

from data.recipe import InputError
from data.values import Completion
from rl.attention import CACHED
from rl.batch import Item, Normaliser, pack
from rl.learner import Learner

PROMPT, COMPLETIONS = 5, (6, 4)
"""Tokens."""
CLOSE = {torch.float32: 0.02, torch.float64: 0.02}
"""Largest mean |d log-prob| that is rounding, by the type the policy computes in."""
CLOSE_BF16 = 0.25
LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping")
"""What configs call that which is done to logits behind the output head."""
ATTENTION = {"full_attention", "sliding_attention"}
WAY_OUT = "is trained wrongly by this learner, so it is refused; take a policy with plain attention and a plain output head"


@torch.no_grad()
def check_forward(learner: Learner) -> None:
    """InputError if the learner cannot train this architecture. Of a sharded policy the config alone is asked."""
    model, config = learner.model, learner.model.config
    if learner.sharded is not None:
        odd = [f"{name} {getattr(config, name)}" for name in LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
        odd += sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
        if odd:
            raise InputError(f"policy.path: {config.model_type} with {', '.join(odd)} {WAY_OUT}")
        return
    drawn = torch.randint(config.vocab_size, (PROMPT + sum(COMPLETIONS),), generator=torch.Generator().manual_seed(0))
    prompt, *completions = drawn.split([PROMPT, *COMPLETIONS])
    items = [Item(0, prompt.numpy().astype(np.int32), _completion(n, c.numpy()), 0.0) for n, c in enumerate(completions)]
    batch = pack([items], Normaliser(len(items), sum(COMPLETIONS)), temperature=1.0, max_tokens=max(COMPLETIONS), device=model.device)
    try:
        ours = learner._logp(model, batch, grad=False)[0]
    except (TypeError, ValueError) as error:
        raise InputError(f"policy.path: the learner cannot run {config.model_type}: {' '.join(str(error).split())}") from None
    kind = config._attn_implementation
    model.set_attn_implementation(CACHED)
    try:
        own = torch.cat([_own_logp(learner, prompt.to(model.device), c.to(model.device)) for c in completions])
    finally:
        model.set_attn_implementation(kind)
    apart = float((ours.float() - own).abs().mean())
    if not apart <= CLOSE.get(model.dtype, CLOSE_BF16):
        raise InputError(
            f"policy.path: the learner's log-probs of this {config.model_type} are {apart:.2g} from those of its own forward in the mean: "
            f"it {WAY_OUT}"
        )


def _completion(index: int, tokens: np.ndarray) -> Completion:
    n = len(tokens)
    zeros = np.zeros(n, np.float32)
    return Completion("", "", index, 0, 0, tokens.astype(np.int32), np.ones(n, np.uint8), zeros, zeros.astype(np.int32), "stop", "")


def _own_logp(learner: Learner, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    """float32 [tokens]: what the whole model says of a completion alone behind its prompt."""
    logits = learner.model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1).gather(1, completion[:, None])[:, 0]
