"""SFT with multi-token prediction: the module learns to predict a token further ahead, from the trunk that learns beside it.

As in DeepSeek-V3's training (arXiv:2412.19437, section 2.2) its loss is added with a weight, and its gradient goes through the trunk,
the embedding and the head. The module and its place in the model are `rl/mtp.py`'s.

    B  sequences      T  tokens of a sequence      R  rows of the module      D  hidden size
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, Trainer
from transformers.masking_utils import create_causal_mask

from rl.logp import logp_and_entropy
from rl.mtp import acceptance, mtp_layer
from sft.tokens import IGNORED


def mtp_loss(model: PreTrainedModel, hidden_BTD: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """The sum of -log p over the learned tokens of a batch, and how often the trunk would accept the module's draft of one.

    `inputs` are the trunk's, packed or padded, with `labels`.

    A row's first learned token is left out where only one token stands before it: the module reads two.
    """
    layer, decoder = mtp_layer(model), model.get_decoder()
    assert layer is not None, "the policy has no multi-token prediction module"
    ids_BT, labels_BT, mask_BT = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
    position_BT = inputs.get("position_ids")
    if position_BT is None:
        position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    # A row of the module for each token but the first of a packed row, or of a padded one: there all begin in column 0.
    keep_T = ~(position_BT == 0).all(0)
    position_BR = position_BT[:, keep_T] - 1
    assert bool((position_BR >= 0).all()), "rows that begin at different places in a batch of several sequences"
    embedded_BRD, before_BRD = decoder.embed_tokens(ids_BT[:, keep_T]), hidden_BTD[:, keep_T.nonzero().flatten() - 1]
    mask = create_causal_mask(
        config=model.config, inputs_embeds=embedded_BRD, attention_mask=None if mask_BT is None else mask_BT[:, keep_T],
        past_key_values=None, position_ids=position_BR,
    )  # fmt: skip
    rotary = decoder.rotary_emb(embedded_BRD, position_BR)
    out_BRD = layer(embedded_BRD, before_BRD, attention_mask=mask, position_ids=position_BR, position_embeddings=rotary)
    target_BR = pad(labels_BT, (0, 1), value=IGNORED)[:, 1:][:, keep_T]
    learned = target_BR != IGNORED
    head = model.get_output_embeddings()
    ahead_ND = out_BRD[learned]
    logp_N, _ = logp_and_entropy(head, ahead_ND, target_BR[learned], 1.0, model.config.vocab_size)
    return -logp_N.sum(), acceptance(head, hidden_BTD.detach()[:, keep_T][learned], ahead_ND.detach(), 1.0)


class WithMtp(Trainer):
    """Adds the module's loss, weighted by `mtp_weight`, to the policy's; stands before trl's trainer, whose numbers it adds to."""

    mtp_weight = 0.0
    _metrics: dict[str, dict[str, list[float]]]

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        kept: list[torch.Tensor] = []
        policy: PreTrainedModel = self.accelerator.unwrap_model(model)
        read = dict(inputs)
        hook = policy.get_decoder().register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
        try:
            result = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        finally:
            hook.remove()
        tokens = num_items_in_batch if num_items_in_batch is not None else int((read["labels"][:, 1:] != IGNORED).sum())
        total, accepted = mtp_loss(policy, kept[0], read)
        own = total / tokens
        numbers = self._metrics["train" if self.model.training else "eval"]
        numbers["mtp_loss"].append(float(own.detach()))
        numbers["mtp_acceptance"].append(accepted)
        if return_outputs:
            return result[0] + self.mtp_weight * own, result[1]
        return result + self.mtp_weight * own
