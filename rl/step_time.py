"""How long a step takes on GPUs, by arithmetic from published rates: what a dry run prints, and nothing else depends on.

Three phases, each the sum of few terms; every term names its formula where it is printed.

    rollout   decode steps, as many as the longest completion has tokens or the slots leave to do, each by what memory or arithmetic allows
    learn     arithmetic at a share of the peak, a pipeline's idle stages, or the gathering of sharded weights, whichever is longer
    sync      the policy's bytes over the link to the engines

The rates are one set for all, an H100's. None is fitted: those that are no data sheet's are assumed, and say so. Held against four
steps that NeMo-RL publishes (`recipes/README.md`, and a test) the estimate is up to half too short: it knows no stragglers, no
kernel launches of small passes, no loading and unloading, no data.

    E  experts      K  experts a token      L  layers      D  hidden size
"""

from dataclasses import dataclass
from math import ceil

from rl.config import TrainRecipe
from rl.estimate import ELEMENT_BYTES, Machine, fitting_slots, learner_ranks, pass_tokens, resident_and_parked, sent_bytes
from rl.sizes import Sizes


@dataclass(frozen=True)
class Rates:
    """Of a GPU and of what joins it to others; per second."""

    flops: float = 989e12
    """BF16, dense (NVIDIA's data sheet of the H100 SXM). FP8 learns at this rate too: published FP8 training of MoE is hardly faster."""
    flops_share: float = 0.2
    """Of the peak that a forward or backward pass reaches. Assumed: Megatron-Bridge publishes .12 to .34 (118 to 338 of 989 TFLOP/s) for
    pre-training of Qwen3-30B-A3B, gpt-oss-120b and DeepSeek-V3 on H100."""
    memory: float = 3.35e12
    """Bytes of HBM3 (the same data sheet)."""
    memory_share: float = 0.7
    """Of it that decoding reaches. Assumed."""
    within: float = 450e9
    """Bytes each way between GPUs of a node (NVLink 4)."""
    between: float = 50e9
    """Bytes each way between nodes, of one GPU (a DGX H100's 400 Gb/s adapter for each)."""
    host: float = 25e9
    """Bytes each way between GPU and host memory. Assumed, of 64 GB/s that PCIe 5 has."""
    join_within_s: float = 10e-6
    join_between_s: float = 40e-6
    """Of one all-reduce of a few tokens among the ranks of an engine, within a node and between nodes. Assumed."""
    decode_step_s: float = 2e-3
    """What an engine needs of the host for each decode step. Assumed."""

    def link(self, gpus: int, gpus_a_node: int) -> float:
        return self.within if gpus <= gpus_a_node else self.between


H100 = Rates()


@dataclass(frozen=True)
class Work:
    """A step in numbers; tokens are means, or the most that there can be."""

    completions: int
    group_size: int
    prompt: float
    """Tokens of a prompt."""
    sampled: float
    """Tokens of a completion."""
    longest: float
    """Tokens of the longest completion."""
    gpus_a_node: int
    # Engines
    engines: int
    slots: int
    """Completions that an engine decodes at once."""
    tensor_parallel: int
    weight_bytes: int
    """Of an engine's weight."""
    element_bytes: int
    """Of an activation, a key or a value."""
    # The learner
    learner_gpus: int
    learned: float
    """Tokens that are forwarded in all."""
    forwards: float
    """Forward passes that each costs: 3 are forward and backward; one more where activations are computed again, for old log-probs, for a
    reference."""
    trained_passes: int = 0
    """Forward and backward passes of a rank for which FSDP gathers all weights; 0 is no FSDP."""
    other_passes: int = 0
    """Forward passes alone."""
    gathered_bytes: int = 2
    """Of a weight as it is gathered."""
    expert_parallel: int = 1
    """GPUs that a layer's experts are spread over."""
    stages: int = 1
    """Of a pipeline."""
    passes_in_flight: int = 1
    """Passes that go through the pipeline behind each other."""
    # Between them
    sync_rate: float = H100.between
    """Bytes a second to the engines."""
    offloaded_bytes: float = 0.0
    """Of the optimizer's state on a GPU, which goes to host memory and comes back."""
    ahead: bool = False
    """Engines sample while the learner learns."""


@dataclass(frozen=True)
class Term:
    name: str
    seconds: float
    formula: str


@dataclass(frozen=True)
class StepTime:
    rollout: tuple[Term, ...]
    learn: tuple[Term, ...]
    sync: tuple[Term, ...]
    ahead: bool

    @property
    def rollout_s(self) -> float:
        return sum(term.seconds for term in self.rollout)

    @property
    def learn_s(self) -> float:
        return sum(term.seconds for term in self.learn)

    @property
    def sync_s(self) -> float:
        return sum(term.seconds for term in self.sync)

    @property
    def total_s(self) -> float:
        return (max(self.rollout_s, self.learn_s) if self.ahead else self.rollout_s + self.learn_s) + self.sync_s


def work_of(recipe: TrainRecipe, sizes: Sizes, machine: Machine, max_model_len: int) -> Work:
    """A step of a recipe on GPUs with vLLM, every completion as long as it may be; the learner is sharded over all its GPUs."""
    rollout, learner = recipe.rollout, recipe.learner
    ranks, updates = learner_ranks(recipe, machine), learner.steps_per_batch * learner.epochs_per_batch
    group, _ = pass_tokens(recipe, max_model_len)
    passes = passes_of(recipe, machine, max_model_len)
    old = updates > 1 and (recipe.loss.ratio_base == "learner" or recipe.loss.replay == "learner")
    others = old + (recipe.loss.kl_coef > 0.0)
    trained = learner.epochs_per_batch
    sharded = ranks > 1
    parked = resident_and_parked(recipe, sizes, machine)[1] if rollout.placement == "colocate" else []
    return Work(
        completions=learner.prompts_per_step * rollout.group_size, group_size=rollout.group_size,
        prompt=max(max_model_len - rollout.max_tokens, 1), sampled=rollout.max_tokens, longest=rollout.max_tokens,
        gpus_a_node=machine.gpus, engines=rollout.engines, slots=fitting_slots(recipe, sizes, machine, max_model_len),
        tensor_parallel=rollout.tensor_parallel, weight_bytes=sent_bytes(recipe), element_bytes=ELEMENT_BYTES[recipe.policy.precision],
        learner_gpus=ranks, learned=learner.prompts_per_step * group,
        forwards=trained * (3 + recipe.policy.activation_checkpointing) + others,
        trained_passes=passes * updates if sharded else 0, other_passes=passes * learner.steps_per_batch * others if sharded else 0,
        gathered_bytes=4 if recipe.policy.precision == "fp8" else ELEMENT_BYTES[recipe.policy.precision],
        sync_rate=_sync_rate(recipe, machine),
        offloaded_bytes=sum(part.bytes for part in parked), ahead=rollout.max_staleness > 0,
    )  # fmt: skip


def _sync_rate(recipe: TrainRecipe, machine: Machine) -> float:
    """Of weights to engines, which are on the first node unless Ray places them: from GPU to GPU, or into host memory and out of it."""
    away = recipe.rollout.placement == "ray"
    if recipe.rollout.weights == "nccl":
        return H100.within if machine.nodes == 1 and not away else H100.between
    return (H100.between if away else H100.host) / 2


def passes_of(recipe: TrainRecipe, machine: Machine, max_model_len: int) -> int:
    """Passes of a rank in an optimizer step, every completion as long as it may be."""
    group, _ = pass_tokens(recipe, max_model_len)
    groups = ceil(ceil(recipe.learner.prompts_per_step / recipe.learner.steps_per_batch) / learner_ranks(recipe, machine))
    return ceil(groups / max(1, recipe.learner.micro_tokens // group))


def step_time(work: Work, sizes: Sizes, rates: Rates = H100) -> StepTime:
    """Seconds of each phase; together, or the longer of sampling and learning where engines sample ahead."""
    return StepTime(_rollout(work, sizes, rates), _learn(work, sizes, rates), _sync(work, sizes, rates), work.ahead)


def _rollout(work: Work, sizes: Sizes, rates: Rates) -> tuple[Term, ...]:
    tp = work.tensor_parallel
    tokens = work.completions / work.engines * work.sampled
    steps = max(work.longest, tokens / work.slots)
    alive = tokens / steps
    # A token goes to K of E experts; what nobody was sent to is not read.
    met = 1 - (1 - sizes.chosen / sizes.experts) ** alive if sizes.experts else 0.0
    weights = work.weight_bytes * (sizes.total - sizes.routed * (1 - met)) / tp
    cache = alive * (work.prompt + work.sampled / 2) * sizes.kv_token * work.element_bytes / min(tp, sizes.kv_split)
    reading = (weights + cache) / (rates.memory * rates.memory_share)
    arithmetic = alive * 2 * sizes.active / (tp * rates.flops * rates.flops_share)
    join = 0.0 if tp == 1 else rates.join_within_s if tp <= work.gpus_a_node else rates.join_between_s
    prompts = work.completions / work.group_size * work.prompt * 2 * sizes.active
    return (
        Term("prompts", prompts / (work.engines * tp * rates.flops * rates.flops_share), "2 x active parameters x prompt tokens"),
        Term(
            "decoding", steps * max(reading, arithmetic),
            f"{steps:,.0f} steps of {alive:,.0f} completions, {(weights + cache) / 1e9:.1f} GB each on a GPU",
        ),
        Term("joins and host", steps * (2 * sizes.layers * join + rates.decode_step_s), "2 x L all-reduces and the host, a step"),
    )  # fmt: skip


def _learn(work: Work, sizes: Sizes, rates: Rates) -> tuple[Term, ...]:
    a_token = 2 * sizes.active + 2 * sizes.attention * (work.prompt + work.sampled) / 2
    arithmetic = work.learned * work.forwards * a_token / (work.learner_gpus * rates.flops * rates.flops_share)
    idle = arithmetic * (work.stages - 1) / work.passes_in_flight
    # Forward and backward gather, and the backward scatters gradients in FP32.
    through = (work.trained_passes * (2 * work.gathered_bytes + 4) + work.other_passes * work.gathered_bytes) * sizes.total
    gathering = through / rates.link(work.learner_gpus, work.gpus_a_node)
    terms = [
        Term(
            "arithmetic", arithmetic, f"{work.forwards:g} forward passes of {work.learned:,.0f} tokens at {rates.flops_share:g} of the peak"
        )
    ]
    if idle:
        terms.append(Term("idle stages", idle, f"{work.stages - 1} of a pipeline, {work.passes_in_flight} passes"))
    if gathering > arithmetic:
        terms.append(
            Term(
                "gathering", gathering - arithmetic, f"{through / 1e12:.2f} TB of weights and gradients through each GPU, beyond arithmetic"
            )
        )
    if work.expert_parallel > 1:
        # There and back, in every forward pass and the backward.
        sent = work.learned * sizes.chosen * sizes.hidden * 2 * 2 * sizes.expert_layers * (work.forwards - 1) / work.learner_gpus
        terms.append(
            Term("tokens to experts", sent / rates.link(work.expert_parallel, work.gpus_a_node), "K x D x 2 bytes, there and back")
        )
    if work.offloaded_bytes:
        terms.append(
            Term("optimizer to host and back", 2 * work.offloaded_bytes / rates.host, f"2 x {work.offloaded_bytes / 1e9:.1f} GB a GPU")
        )
    return tuple(terms)


def _sync(work: Work, sizes: Sizes, rates: Rates) -> tuple[Term, ...]:
    size = work.weight_bytes * sizes.total
    return (Term("weights", size / work.sync_rate, f"{size / 1e9:.1f} GB at {work.sync_rate / 1e9:.0f} GB/s"),)
