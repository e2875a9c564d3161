"""The sections of a GRPO recipe and the recipe itself. The string under a field is its help: meaning, unit, special value, source.

`prompts` is defined in `data/`, `rewards` in `rewards/`; all other sections are here.
"""

import math
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from data.prompt_config import PromptsConfig
from data.recipe import Section
from rewards.config import RewardsConfig
from rewards.plugins import CONVERSATIONS, find_plugin


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][\w.\-]*$")
    """Names the run and its folder, `<output_dir>/<name>`."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything drawn: order of prompts, completions, initial adapters."""
    output_dir: str = "outputs"
    """Where run folders are."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on if the folder holds this recipe, print the result again if it is finished; never: refuse a folder in use."""


class LoraConfig(Section):
    rank: int = Field(16, ge=1)
    """Rank of each update."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """Modules by the ends of their names, or `all-linear`: all but the output head, experts' matrices and routers among them."""
    parameters: list[str] = []
    """Further parameters by the ends of their names, such as `mlp.experts.down_proj`."""


class Fp8Config(Section):
    """Of `precision: fp8`; none of it has to be in a recipe."""

    backend: Literal["reference", "torch", "triton"] = "reference"
    """Who computes the products. reference: runs anywhere, and is what the others are held against; torch: `scaled_mm` on Hopper; triton:
    kernels of our own. These two have not run on a GPU yet. One that cannot run here is an error."""
    keep: list[str] = ["lm_head", "gate", "eh_proj"]
    """Modules that stay in high precision, by the ends of their names; embedding, norms and routers always do."""
    rest: Literal["bf16", "fp32"] = "bf16"
    """Type of what is not FP8: activations between products, embedding, output head, norms."""
    quantize_activations: bool = True
    """Off: weights alone are in FP8, as a vLLM engine on a CPU computes (W8A16)."""


class PolicyConfig(Section):
    path: str | None = None
    """Folder or hub id with safetensors, config and tokenizer."""
    revision: str | None = None
    """Revision of a hub id."""
    config: str | None = None
    """A model config in JSON, for the sizes of a dry run where the weights are not at hand."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Of forward and backward. bf16: matrices; residual stream and norms stay in FP32. fp8: as DeepSeek-V3 trains (`rl/fp8`), with what is
    left in `fp8.rest`."""
    fp8: Fp8Config = Fp8Config()
    """What `precision: fp8` means."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and leave the weights as they are; null trains all weights."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward: less memory, about a third more time."""

    @model_validator(mode="after")
    def _some_source(self) -> "PolicyConfig":
        if self.path is None:
            raise ValueError("policy.path is missing: a folder or a hub id; `accelerate launch -m sft.train` makes one")
        return self


class RolloutConfig(Section):
    engine: Literal["vllm", "hf"] = "vllm"
    """vllm: a process of its own for each engine; hf: transformers in this process, for tests and bit-exact runs."""
    engines: int = Field(1, ge=1)
    """Number of engines; with `servers` as many as these."""
    servers: list[str] = []
    """Engines on other machines, by URL (`http://host:port`), each started there by `python -m rl.serve RECIPE`; none: engines of
    this machine."""
    server_token_env: str | None = None
    """Environment variable that holds the servers' token; null: they have none, and listen on their own machine alone."""
    group_size: int = Field(8, ge=2)
    """G: completions of a prompt that are judged against each other. One alone has nothing to be judged against."""
    max_tokens: int = Field(64, ge=1)
    """Longest completion, in tokens; in a conversation all turns together, with what tools wrote between them."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt and completion together, in tokens; null: the longest prompt plus max_tokens."""
    temperature: float = Field(1.0, gt=0.0, le=10.0)
    """Of sampling; the learner's log-probs are at the same temperature."""
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = []
    """Strings that end a completion, besides the tokenizer's end of text; they stay in it."""
    conversation: str | None = None
    """An async function that makes a completion of several turns, with tools between them (`rl/conversation.py`): ./file.py:function,
    package.module:function, or an installed entry point of `cohort.conversations`. null: a completion is one turn."""
    conversation_timeout_s: float = Field(30.0, gt=0.0)
    """Longest that a conversation may take between two turns of the policy; one that takes longer is a failed completion."""
    slots: int = Field(128, ge=1)
    """Completions an engine decodes at once (vLLM's max_num_seqs)."""
    draft_tokens: int = Field(0, ge=0)
    """Tokens that vLLM drafts at a time with DeepSeek-V3's multi-token prediction module, to be kept or not in one pass of the policy
    (speculative sampling, arXiv:2211.17192): completions come from the same distribution, and sooner. 0: none."""
    weights: Literal["file", "nccl"] = "file"
    """How weights reach vLLM engines. file: shared memory, which an engine that died is brought back from; nccl: GPU to
    GPU, keeps no copy, and an engine that dies ends the run. It has not run on a GPU."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, lt=1.0)
    """Share of a GPU that a vLLM engine takes; under colocate the learner's weights need room in the rest. Not used on CPU."""
    stall_s: float = Field(60.0, gt=0.0)
    """An engine that has work and samples no token for so many seconds is hung, and is started again; as long again for each 2048
    tokens of the longest prompt it has to read."""
    max_resamples: int = Field(3, ge=0)
    """How often in a step a group that could not be scored is asked again."""
    resample_zero_groups: bool = False
    """Take further prompts for groups whose rewards are all equal (DAPO's dynamic sampling, arXiv:2503.14476), within max_resamples."""
    max_staleness: int = Field(0, ge=0)
    """Versions that a group may be older than the weights it trains, by its oldest token. 0 is on-policy: engines wait while the
    learner learns; above 0 they sample ahead."""
    in_flight: bool = False
    """Engines take new weights in the middle of completions, which go on from there; otherwise they finish what they have first."""
    oversample: float = Field(0.0, ge=0.0)
    """Share of prompts_per_step that is sampled beyond what a step takes: a step takes what is ready first, and the slowest go on into
    the next one, under new weights as with `in_flight`. At most max_staleness."""
    placement: Literal["split", "colocate", "ray"] = "split"
    """split: engines on GPUs (or cores) of their own; colocate: on the learner's, in turns: engines sleep while it learns, and its
    optimizer's state goes to host memory while they sample, where both do not fit (`--dry-run` says so). vLLM's sleep mode has not
    run on a GPU here; on a CPU nothing is freed. ray: on a Ray cluster (RAY_ADDRESS, or one of this machine), where it has room."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs for each engine."""

    @model_validator(mode="after")
    def _true_distribution(self) -> "RolloutConfig":
        # The learner's ratio is over the full softmax; an engine that samples from a truncated one has other log-probs.
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"top_p {self.top_p:g} and top_k {self.top_k} truncate what the engine samples from, while the learner's "
                "ratio is over the whole softmax; training takes top_p 1 and top_k 0"
            )
        return self

    @model_validator(mode="after")
    def _drafts(self) -> "RolloutConfig":
        if self.draft_tokens and self.engine != "vllm":
            raise ValueError(f"draft_tokens {self.draft_tokens}: vLLM drafts, and engine is {self.engine}; take vllm, or draft_tokens 0")
        if self.draft_tokens and self.weights == "nccl":
            raise ValueError(
                f"draft_tokens {self.draft_tokens}: the drafter gets its weights from the weight file, and weights nccl has none; "
                "take weights file, or draft_tokens 0"
            )
        return self

    @model_validator(mode="after")
    def _ahead(self) -> "RolloutConfig":
        if self.placement == "colocate" and self.max_staleness > 0:
            raise ValueError(
                f"placement colocate has engines and learner take turns, and max_staleness {self.max_staleness} is for sampling while "
                "the learner learns; take placement split, or max_staleness 0"
            )
        if self.in_flight and self.max_staleness == 0:
            raise ValueError("in_flight true: completions then have tokens of older weights; set max_staleness to 1 or more")
        if self.oversample > self.max_staleness:
            raise ValueError(
                f"oversample {self.oversample:g} puts completions off for longer than max_staleness {self.max_staleness} allows; "
                f"raise max_staleness to {math.ceil(self.oversample)} or more, or lower oversample"
            )
        return self

    @property
    def interrupts(self) -> bool:
        """Whether completions go on under new weights."""
        return self.in_flight or self.oversample > 0.0

    @model_validator(mode="after")
    def _nccl_needs_vllm(self) -> "RolloutConfig":
        if self.weights == "nccl" and self.engine != "vllm":
            raise ValueError(f"weights nccl is vLLM's backend, and engine is '{self.engine}'; take weights: file")
        if self.weights == "nccl" and self.placement == "colocate":
            raise ValueError(
                "weights nccl joins GPUs, and under placement colocate both ends are on one, which NCCL refuses; take weights: file"
            )
        return self

    @field_validator("conversation")
    @classmethod
    def _conversation(cls, value: str | None) -> str | None:
        if value is not None:
            find_plugin(value, CONVERSATIONS)
        return value

    @field_validator("servers")
    @classmethod
    def _urls(cls, urls: list[str]) -> list[str]:
        for index, url in enumerate(urls):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
                raise ValueError(f"'{url}' is no address of a server; write http://host:port")
            if url in urls[:index]:
                raise ValueError(f"'{url}' stands twice; a server is one engine")
        return urls

    @model_validator(mode="after")
    def _engines_elsewhere(self) -> "RolloutConfig":
        if self.servers and self.engines not in (1, len(self.servers)):
            raise ValueError(f"engines {self.engines}, and there are {len(self.servers)} servers; leave engines out")
        if self.servers and self.placement != "split":
            raise ValueError("servers are where they were started; take placement split")
        if self.elsewhere and self.weights == "nccl":
            raise ValueError("weights nccl goes to engines of this machine; engines elsewhere get them over the network with weights: file")
        return self

    @property
    def elsewhere(self) -> bool:
        """Whether the engines are none of this machine's, so that nothing here has to be there for them."""
        return bool(self.servers) or self.placement == "ray"


class AdvantageConfig(Section):
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """mean: of the group (GRPO, arXiv:2402.03300); leave_one_out: of the other completions (RLOO, arXiv:2402.14740)."""
    scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation to divide by: the group's, the batch's, or none (Dr. GRPO, arXiv:2503.20783)."""
    ddof: Literal[0, 1] = 0
    """Of the standard deviation; trl uses 1."""
    eps: float = Field(1e-4, ge=0.0)
    """Added to the standard deviation."""


class LossConfig(Section):
    kind: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"
    """Paper of each: `rl/loss.py`."""
    clip_low: float = Field(0.2, ge=0.0)
    """Lower bound of the ratio is 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0.0)
    """Upper bound of the ratio is 1 + clip_high; DAPO uses 0.28 (arXiv:2503.14476)."""
    kl_coef: float = Field(0.0, ge=0.0)
    """Weight of the KL to the reference, the policy as it was when the run began; 0: no reference is kept."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL (Schulman 2020); k3 is unbiased and non-negative."""
    ratio_base: Literal["learner", "engine"] = "learner"
    """Whose log-probs are old_logp: the learner's at the start of the step, or the engine's. Where engines sample ahead of the learner,
    engine bounds what steps do together to what was sampled once, and saves a pass."""
    correction: Literal["none", "token", "sequence", "geometric"] = "token"
    """Weight for engine against learner, exp(old_logp - engine_logp): truncated by token, or masked by sequence."""
    correction_max: float = Field(2.0, gt=1.0)
    """token: weights are cut to this; sequence and geometric: completions outside [1/max, max] are masked."""
    mask_truncated: bool = False
    """Completions cut off at max_tokens teach nothing (DAPO's overlong filtering)."""
    replay: Literal["none", "learner", "rollout"] = "none"
    """Experts that are chosen again. learner: those of the start of the step, in its later updates; rollout: the engine's
    (arXiv:2510.11370), by the hf engine or by vLLM on a GPU."""


class OptimizerConfig(Section):
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled, on matrices alone (AdamW)."""
    masters: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights that the optimizer moves; bf16 rounds each update up or down at random, so that small ones add up."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Type of both moments; DeepSeek-V3 keeps BF16 (arXiv:2412.19437, section 3.3.3), with betas 0.9 and 0.95."""

    @model_validator(mode="after")
    def _moments_can_fall(self) -> "OptimizerConfig":
        # BF16 resolves steps of 2^-8; a decay by less is rounded back, so the second moment would only ever grow.
        if self.moments == "bf16" and self.betas[1] > 1 - 2**-8:
            raise ValueError(f"betas[1] {self.betas[1]:g} is too slow for bf16 moments, which cannot fall by so little; use 0.95, or fp32")
        return self


class RouterConfig(Section):
    """What keeps the experts of a mixture evenly loaded; 0 is off."""

    bias_step: float = Field(0.0, ge=0.0)
    """DeepSeek-V3's correction bias moves by this against each expert's load, once a step; 1e-3 in arXiv:2412.19437, section 4.2."""
    sequence_loss: float = Field(0.0, ge=0.0)
    """Weight of DeepSeek-V3's loss over each sequence (section 2.1.2, where it is 1e-4)."""
    aux_loss: float = Field(0.0, ge=0.0)
    """Weight of Qwen3-MoE's auxiliary loss; 1e-3 in its published configs. Over several passes it costs one more forward."""


class MtpConfig(Section):
    weight: float = Field(0.0, ge=0.0)
    """Of the loss of DeepSeek-V3's multi-token prediction module (arXiv:2412.19437, section 2.2); 0 leaves the module as it is."""
    detach: bool = True
    """Its gradient stays in the module; the policy and its output head get none of it."""


class LearnerConfig(Section):
    steps: int = Field(60, ge=1)
    """Steps of the run; each samples, scores and learns from prompts_per_step groups."""
    prompts_per_step: int = Field(32, ge=1)
    """P: groups a step."""
    steps_per_batch: int = Field(1, ge=1)
    """Optimizer steps for each batch of groups, which is split among them."""
    epochs_per_batch: int = Field(1, ge=1)
    """Passes over each batch of groups."""
    micro_tokens: int = Field(16384, ge=1)
    """Tokens of one forward and backward pass on a rank; a longer group is a pass of its own."""
    lr: float = Field(1e-4, gt=0.0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up; linear and cosine end at 0 after schedule_steps."""
    schedule_steps: int | None = Field(None, ge=1)
    """Steps of the run over which the schedule falls; null: `steps`."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of the run over which the learning rate rises from 0."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """The gradient is scaled down to this L2 norm."""
    optimizer: OptimizerConfig = OptimizerConfig()
    router: RouterConfig = RouterConfig()
    mtp: MtpConfig = MtpConfig()
    threads: int | None = Field(None, ge=1)
    """CPU threads of the learner; null: all cores but not more than 16."""

    @model_validator(mode="after")
    def _enough_groups(self) -> "LearnerConfig":
        if self.steps_per_batch > self.prompts_per_step:
            raise ValueError(
                f"steps_per_batch {self.steps_per_batch} is more than prompts_per_step {self.prompts_per_step}: "
                "every optimizer step needs a group"
            )
        return self


class EvalConfig(Section):
    every: int = Field(20, ge=0)
    """Steps between evaluations; 0: only before the first step and after the last."""
    prompts: PromptsConfig | None = None
    """Held-out prompts; null: no evaluation."""
    samples: int = Field(4, ge=1)
    """Completions of each prompt."""
    temperature: float = Field(1.0, ge=0.0)
    """0 is greedy."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest completion; null: rollout.max_tokens."""
    greedy: bool = True
    """Also one greedy completion of each prompt before the first step and after the last, so that mere sharpening shows."""
    reward: str | None = None
    """The part that says whether a completion is right (1) or not, by its own value, before gates; null: the first of rewards.parts."""


class CheckpointConfig(Section):
    every: int = Field(20, ge=0)
    """Steps between checkpoints; 0: only after the last."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep."""


class LogConfig(Section):
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "aim", "swanlab", "trackio"]] = []
    """Trackers of accelerate that get the numbers of metrics.jsonl as well."""
    completions: bool = True
    """Write `completions/step-<N>.parquet`, all completions of a step with their scores and what became of each."""


class HardwareConfig(Section):
    """What a dry run holds the recipe against; a run itself uses what is there."""

    gpus: int = Field(ge=1)
    """GPUs of a node. Under placement `split` the first node's last `engines * tensor_parallel` are the engines', the rest learn; under
    `colocate` all learn, and the first node's first ones sample too."""
    gpu_gb: float = Field(gt=0.0)
    """Memory of one GPU, in 10^9 bytes."""
    nodes: int = Field(1, ge=1)


class TrainRecipe(Section):
    """`rl.train`: GRPO from a policy, prompts and rewards."""

    run: RunConfig
    policy: PolicyConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    hardware: HardwareConfig | None = None
    """The machine that `--dry-run` estimates for; null: this one."""

    @model_validator(mode="after")
    def _later_updates(self) -> "TrainRecipe":
        if self.loss.replay == "learner" and self.learner.steps_per_batch * self.learner.epochs_per_batch == 1:
            raise ValueError(
                "loss.replay learner repeats routes in the later updates of a step, and steps_per_batch and epochs_per_batch are 1: "
                "there is one; take none"
            )
        return self

    @model_validator(mode="after")
    def _masters(self) -> "TrainRecipe":
        if self.learner.optimizer.masters == "bf16" and (self.policy.precision == "fp32" or self.policy.lora is not None):
            what = "policy.lora trains FP32 matrices" if self.policy.lora is not None else "policy.precision fp32 keeps weights in FP32"
            raise ValueError(f"learner.optimizer.masters 'bf16': {what}; leave masters at fp32, or train all weights in bf16 or fp8")
        return self
