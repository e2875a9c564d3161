"""Multi-token prediction, the module that DeepSeek-V3 trains beside its trunk (arXiv:2412.19437, section 2.2, depth 1).

It reads what the trunk made of token i and the embedding of token i+1, and predicts token i+2 with the trunk's own output head:

    h'_i = M [RMSNorm(Emb(t_{i+1})); RMSNorm(h_i)]        (eq. 21; checkpoints put the embedding first)
    p(t_{i+2} | t_{<=i+1}) = OutHead(RMSNorm(TRM(h')_i))  (eq. 22, 23)

h is the trunk's output after its final norm, as in the published weights' inference code. The row at position 0, which reads the first
two tokens of a sequence, gets a zero for its embedding, as in vLLM: a module that leant on that row would draft otherwise there.
transformers drops the module when it loads a
checkpoint (`model.layers.<num_hidden_layers>.*`). Here it is one layer more in the decoder's list, which the decoder does not run: so
its tensors have their published names wherever tensors are walked - optimizer, checkpoint, weight update - and embedding and head are
written once more at the end, as published.

In the flat batch of `rl/batch.py` the module has a row for each token but the first of a prompt, and predicts what the trunk
predicts at that row; it attends as the trunk does, so a shared prompt is forwarded once here as well.

    T  tokens forwarded      R  rows of the module      N  predicted tokens      D  hidden size      V  vocabulary
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from data.recipe import InputError
from rl.attention import layout_of
from rl.batch import TrainBatch
from rl.config import MtpConfig
from rl.experts import expert_views
from rl.fp8.files import Fp8Files
from rl.logp import logp_and_entropy
from rl.lora import has_adapter
from rl.ranks import Ranks

SHARED = ("embed_tokens.weight", "shared_head.head.weight")
"""Tensors of the trunk that a published checkpoint repeats under the module's name."""


class MtpLayer(DeepseekV3DecoderLayer):
    """The module: a decoder layer of the trunk's kind behind the projection of hidden state and embedding."""

    def __init__(self, config: object, layer_idx: int):
        super().__init__(config, layer_idx)
        width, eps = config.hidden_size, config.rms_norm_eps  # type: ignore[attr-defined]
        self.enorm = DeepseekV3RMSNorm(width, eps=eps)
        self.hnorm = DeepseekV3RMSNorm(width, eps=eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(width, eps=eps)})

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor, position_ids: torch.Tensor, **attention: Any) -> torch.Tensor:
        """What the output head reads, from embeddings and hidden states [..., R, D] at positions [..., R]; `attention` is what a decoder
        layer takes.

        All of it is one call of this module: a sharded one gathers its weights for the call.
        """
        embedded = embedded.masked_fill(position_ids[..., None] == 0, 0.0)
        combined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)).to(hidden.dtype)  # eq. 21
        return self.shared_head["norm"](super().forward(combined, position_ids=position_ids, **attention))


def mtp_layer(model: PreTrainedModel) -> MtpLayer | None:
    """The model's module, if it has one."""
    layers = model.get_decoder().layers
    return layers[-1] if isinstance(layers[-1], MtpLayer) else None


def attach(model: PreTrainedModel, seed: int | None = None) -> MtpLayer:
    """Gives a DeepSeek-V3 a module with random weights (`seed`), or with none yet; the config says so from then on."""
    config = model.config
    if config.model_type != "deepseek_v3":
        raise InputError(f"policy: multi-token prediction is DeepSeek-V3's, and this is a {config.model_type}; set mtp weights to 0")
    layers = model.get_decoder().layers
    assert len(layers) == config.num_hidden_layers, "it has a module already"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        layer = MtpLayer(config, config.num_hidden_layers).to(model.device, model.dtype)
        if seed is not None:
            layer.apply(model._init_weights)
    layers.append(layer.train(model.training))
    config.num_nextn_predict_layers = 1
    return layer


def in_files(folder: Path, config: Any) -> bool:
    """Whether a checkpoint has a module. transformers drops it when it saves, and keeps the number in the config."""
    if config.model_type != "deepseek_v3" or not getattr(config, "num_nextn_predict_layers", 0):
        return False
    return any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in Fp8Files(folder).names())


def load_mtp(model: PreTrainedModel, folder: Path) -> None:
    """Attaches the module of a checkpoint and fills it, if the checkpoint has one.

    InputError if the config names one and a tensor of it is missing or has another shape.
    """
    if not in_files(folder, model.config):
        if getattr(model.config, "num_nextn_predict_layers", 0):
            model.config.num_nextn_predict_layers = 0
        return
    if model.config.num_nextn_predict_layers > 1:
        raise InputError(f"policy.path: '{folder}' predicts {model.config.num_nextn_predict_layers} tokens ahead; one is supported")
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    found = dict(_tensors(folder, prefix))
    layer = attach(model)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        for inner, view in expert_views(name, tensor.detach()):
            if inner not in found or found[inner].shape != view.shape:
                has = f"has the shape {list(found[inner].shape)}" if inner in found else "is missing"
                raise InputError(f"policy.path: cannot load '{folder}': {prefix}{inner} {has}, and its config asks for {list(view.shape)}")
            view.copy_(found.pop(inner))
    if unknown := sorted(set(found) - set(SHARED)):
        raise InputError(f"policy.path: cannot load '{folder}': {prefix}{unknown[0]} is no tensor of a multi-token prediction module")


def _tensors(folder: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors whose names begin so, without the prefix; codes as the values they stand for."""
    files = Fp8Files(folder)
    return ((name.removeprefix(prefix), files.tensor(name)) for name in files.names() if name.startswith(prefix))


# --- forward ----------------------------------------------------------------------------------------------------------


def mtp_rows(batch: TrainBatch) -> tuple[TrainBatch, torch.Tensor, torch.Tensor]:
    """The module's batch, without the first row of every prompt; and of each of its rows, int64 [R], the trunk's row of the same token
    and of the token before.

    Its predicted tokens are those of `batch`, in the same order; its positions are those of the rows it reads, as in inference.
    Raises ValueError for a prompt of one token.
    """
    own = set(batch.segment_of_B)
    before_T = torch.arange(len(batch.tokens_T), device=batch.tokens_T.device) - 1
    keep_T = torch.ones_like(before_T, dtype=torch.bool)
    for segment, prompt in zip(batch.segment_of_B, batch.prompt_of_B, strict=True):
        begin, end = batch.bounds_S[segment]
        if begin < end:
            before_T[begin] = batch.bounds_S[prompt][1] - 1  # a completion goes on from its prompt
    for segment, (begin, end) in enumerate(batch.bounds_S):
        if segment not in own:
            if end - begin < 2 and batch.completions:
                raise ValueError("a prompt of one token: multi-token prediction reads two; leave it out, or set its weight to 0")
            keep_T[begin] = end - begin < 2  # a pass of weight zero keeps its one row
    before_T.clamp_(min=0)
    place_T = keep_T.cumsum(0) - 1
    bounds = tuple((int(place_T[b]) + (not keep_T[b]), int(place_T[e - 1]) + 1) if b < e else (0, 0) for b, e in batch.bounds_S)
    rows = replace(
        batch, tokens_T=batch.tokens_T[keep_T], position_T=(batch.position_T[keep_T] - 1).clamp(min=0), segment_T=batch.segment_T[keep_T],
        count_T=batch.count_T[keep_T], bounds_S=bounds, source_N=place_T[batch.source_N],
    )  # fmt: skip
    return rows, keep_T.nonzero().flatten(), before_T[keep_T]


def mtp_hidden(model: PreTrainedModel, embedded_TD: torch.Tensor, hidden_TD: torch.Tensor, batch: TrainBatch, detach: bool) -> torch.Tensor:
    """[N, D]: what the output head reads to predict each of the batch's tokens once more, a token further ahead.

    embedded_TD and hidden_TD are the trunk's embeddings and its last hidden state. `detach`: neither gets a gradient of it.
    """
    layer, decoder = mtp_layer(model), model.get_decoder()
    assert layer is not None, "the policy has no multi-token prediction module"
    if detach:
        hidden_TD, embedded_TD = hidden_TD.detach(), embedded_TD.detach()
    rows, own_R, before_R = mtp_rows(batch)
    position = rows.position_T[None]
    rotary = decoder.rotary_emb(hidden_TD, position)
    cohort = layout_of(rows)
    out = layer(embedded_TD[own_R][None], hidden_TD[before_R][None], position_ids=position, position_embeddings=rotary, cohort=cohort)
    return out[0][rows.source_N]


def acceptance(head: nn.Module, hidden_ND: torch.Tensor, ahead_ND: torch.Tensor, temperature: float, rows: int = 256) -> float:
    """How often the trunk would accept the module's draft: the mean over N of sum_x min(p(x), q(x)).

    That is the chance that speculative sampling keeps a token drafted from q where p is wanted (arXiv:2211.17192, corollary 3.6).
    """
    total = 0.0
    with torch.no_grad():
        for hidden, ahead in zip(hidden_ND.split(rows), ahead_ND.split(rows), strict=True):
            p, q = ((head(x).float() / temperature).softmax(-1) for x in (hidden, ahead))
            total += float(torch.minimum(p, q).sum())
    return total / max(1, len(hidden_ND))


class MtpLoss:
    """Keeps the module in step with a policy that moves: its own loss on the tokens that the policy is trained on.

    The mean of -log p over the predicted tokens of a step, at temperature 1 (eq. 24 and 25). Tokens of groups that are not forwarded
    are missing in the sum.
    """

    def __init__(self, model: PreTrainedModel, config: MtpConfig, ranks: Ranks):
        """Raises InputError if a policy without the module is to train one."""
        self.model = model
        self.config = config
        self.ranks = ranks
        self.on = config.weight > 0.0
        self._sums = torch.zeros(3, dtype=torch.float64)
        """Of the step so far, on this rank: loss, acceptance, tokens."""
        layer = mtp_layer(model)
        if self.on and layer is None:
            raise InputError(
                "learner.mtp.weight: the policy has no multi-token prediction module; set it to 0, or attach one (sft.mtp_weight)"
            )
        if layer is not None:
            adapter = has_adapter(layer)  # base weights stay as they are, codes among them
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(self.on and ("lora_" in name or not adapter))
        self._embedded_TD: torch.Tensor | None = None
        """Of the trunk's last pass: a sharded embedding is there within that pass alone."""
        if self.on:
            model.get_input_embeddings().register_forward_hook(self._keep_embedded)

    def _keep_embedded(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._embedded_TD = output[0]

    def __call__(self, batch: TrainBatch, hidden_TD: torch.Tensor, head: Any) -> torch.Tensor | float:
        """A pass's share of the loss, after the trunk's pass; `head` is the trunk's output head. Adds to the step's numbers."""
        if not self.on:
            return 0.0
        detach = self.config.detach
        assert self._embedded_TD is not None
        ahead_ND = mtp_hidden(self.model, self._embedded_TD, hidden_TD, batch, detach)
        self._embedded_TD = None
        if detach:
            weight_VD = head.weight.detach()
            head = lambda x: nn.functional.linear(x.to(weight_VD.dtype), weight_VD)  # noqa: E731
        logp_N, _ = logp_and_entropy(head, ahead_ND, batch.target_N, 1.0, self.model.config.vocab_size)
        tokens = len(logp_N)
        overlap = acceptance(head, hidden_TD.detach()[batch.source_N], ahead_ND.detach(), batch.temperature) * tokens
        self._sums += torch.tensor([-float(logp_N.detach().sum()), overlap, tokens], dtype=torch.float64)
        return -self.config.weight * logp_N.sum() / batch.normaliser.tokens

    def parameters(self) -> list[str]:
        """Names of what it trains beside the policy: with `detach` their gradients are no business of the policy's clipping."""
        if not (self.on and self.config.detach):
            return []
        prefix = f"model.layers.{self.model.config.num_hidden_layers}."
        return [name for name, _ in self.model.named_parameters() if name.startswith(prefix)]

    def collect(self) -> dict[str, float]:
        """The step's numbers, equal on all ranks; collective. None if the module is not trained."""
        if not self.on:
            return {}
        loss, accepted, tokens = self.ranks.sum(self._sums.to(self.ranks.device)).tolist()
        self._sums = torch.zeros(3, dtype=torch.float64)
        return {"mtp/loss": loss / tokens, "mtp/acceptance": accepted / tokens} if tokens else {}


# --- what is saved ----------------------------------------------------------------------------------------------------


def repeated(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The embedding and head that a published checkpoint repeats for the module, by name; nothing if there is no module."""
    if mtp_layer(model) is not None:
        prefix = f"model.layers.{model.config.num_hidden_layers}."
        yield prefix + SHARED[0], model.get_input_embeddings().weight
        yield prefix + SHARED[1], model.get_output_embeddings().weight
