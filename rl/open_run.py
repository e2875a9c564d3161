"""Puts a run together from a recipe: from the start, or from the newest whole checkpoint.

Everything that can be wrong with the inputs is found before the folder is claimed and before an engine starts. What is opened is
closed in the opposite order, whatever happens.
"""

import ctypes
import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.completions import cut_completions
from data.journal import Journal
from data.journal_file import InUse
from data.prompt_stream import PromptStream
from data.prompts import PromptSet
from data.recipe import InputError
from data.values import Prompt
from rewards.alarms import Alarms
from rewards.scorer import Scorer
from rewards.versions import META as VERSIONS
from rewards.versions import reward_versions
from rl.ahead import AheadStream, Pump
from rl.checkpoint import check_room, full_disk_named
from rl.command import asked_to_end
from rl.config import TrainRecipe
from rl.conversation_pool import make_pool
from rl.engines.make import make_engines
from rl.engines.nccl import NcclSync
from rl.engines.vllm import preload
from rl.engines.weights import Manifest, TensorSpec, read_manifest
from rl.estimate import WEIGHT_BYTES
from rl.forward_check import check_forward
from rl.fp8.convert import Masters, fp8_model
from rl.fp8.folder import engine_policy
from rl.inputs import check_gpus, check_router, check_routes, read_prompt_sets
from rl.learner import Learner
from rl.lora import add_adapter
from rl.metrics_file import MetricsFile
from rl.mixed import residual_in_fp32
from rl.placement import ColocatedStream, ColocatedSync, Turns
from rl.policy import DTYPES, drop_nothing, load_model, load_tokenizer, policy_fingerprint, policy_folder
from rl.progress import Display
from rl.ranks import Ranks
from rl.router import cut_router
from rl.run import Run
from rl.run_folder import RunFolder
from rl.shard import check_sharded, shard, wanted
from rl.stream import GroupStream, SharedStream
from rl.sync import WeightSync

PR_SET_PDEATHSIG = 1


@contextmanager
def open_run(recipe: TrainRecipe, folder: RunFolder, ranks: Ranks) -> Iterator[Run]:
    """A run that is ready for its next step. InputError, one line, for inputs that are wrong; a new folder is then left empty."""
    with full_disk_named(folder.path / "checkpoints", "what the run writes"), ExitStack() as stack:
        stack.callback(ranks.close)
        try:
            run = _open(recipe, folder, ranks, stack)
        except InputError as error:
            stack.close()
            if not isinstance(error, InUse):
                folder.withdraw()
            raise
        yield run


def _open(recipe: TrainRecipe, folder: RunFolder, ranks: Ranks, stack: ExitStack) -> Run:
    torch.set_num_threads(recipe.learner.threads or min(os.cpu_count() or 1, 16))
    assert recipe.policy.path is not None
    check_gpus(recipe.rollout, torch.cuda.device_count(), recipe.loss.replay)
    if ranks.main and recipe.rollout.engine == "vllm" and not recipe.rollout.elsewhere:
        preload()  # importing vllm takes ten seconds; it goes on beside what follows
    source = policy_folder(recipe.policy.path, recipe.policy.revision)
    check_router(recipe, source / "config.json")
    tokenizer = load_tokenizer(source)
    run = Run(recipe, folder, ranks, tokenizer)
    prompts, held_out, longest = _prompts(recipe, tokenizer) if ranks.main else (None, None, 0)
    seen = run.checkpoints.steps()
    run.start = ranks.from_main(run.checkpoints.newest() or 0 if ranks.main else 0)
    run.learner = _learner(run, source)
    for read in (prompts, held_out):
        _check_vocabulary(read.prompts if read else (), run)
        check_routes(read.prompts if read else (), recipe)
    if ranks.main:
        _check_room(run)
        folder.claim()
        run.journal = stack.enter_context(Journal(folder.path / "journal.sqlite"))  # from here on we are its one writer
        if run.checkpoints.steps() != seen:
            raise InUse(f"{folder.path}: another process has just ended here and left a checkpoint; start again to go on from it")
        _check_same_inputs(run, source, prompts)
        folder.go_on()
        run.checkpoints.set_aside_after(run.start)
    run.display = Display(recipe.run.name, recipe.learner.steps, run.start, shown=ranks.main)
    if ranks.main:
        _note_rewards(run)
    if prompts is not None:
        _say_prompts(run, prompts, held_out)
    stack.enter_context(run.display)
    turns = _turns(run)
    stream = None
    manifest: dict[str, TensorSpec] | None = None
    if prompts is not None:
        run.held_out = held_out.prompts if held_out else ()
        begin_with = engine_policy(recipe.policy, source, folder.path / "engine_policy")
        manifest = _manifest(run.learner, begin_with)
        stream = _open_rollouts(run, begin_with, manifest, prompts, longest, stack)
    run.stream = ColocatedStream(ranks, stream, turns) if turns else SharedStream(ranks, stream)
    run.sync = _sync(run, manifest, turns)
    stack.callback(run.sync.close)
    if stream is not None:
        run.sync.standing_still = stream.standing_still
        run.pool.catch_up = run.sync.replay
    _restore(run)
    if isinstance(stream, AheadStream):
        stack.enter_context(Pump(stream))
    _watch_signals(run, stack)
    return run


def _prompts(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptSet, PromptSet | None, int]:
    """Prompts to train on, held-out prompts, and the longest prompt and completion together in tokens."""
    held_out = [recipe.eval.prompts] if recipe.eval.prompts else []
    sets, longest = read_prompt_sets(recipe, [recipe.prompts, *held_out], tokenizer)
    return sets[0], sets[1] if held_out else None, longest


def _learner(run: Run, source: Path) -> Learner:
    """The learner with the weights of the newest checkpoint, or of the policy."""
    recipe, ranks = run.recipe, run.ranks
    fp8 = recipe.policy.fp8 if recipe.policy.precision == "fp8" else None
    compute = DTYPES[fp8.rest if fp8 else recipe.policy.precision]
    sharded = compute if wanted() else None
    check_sharded(recipe)
    masters_bf16 = recipe.learner.optimizer.masters == "bf16"

    # With it transformers loads zeros on all ranks but the first and counts on a broadcast; here each keeps its share of its own copy.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    def load(folder: Path, masters: Masters) -> PreTrainedModel:
        if fp8 is not None:
            kind = torch.bfloat16 if masters_bf16 else torch.float32
            rest = torch.float32 if sharded is not None else None
            model = fp8_model(folder, fp8, ranks.device, masters=masters, master_type=kind, rest=rest)
        else:
            model = load_model(folder, torch.float32 if sharded is not None else compute)  # what is sharded are the FP32 masters
        if sharded is not None:
            shard(model, ranks, compute)
        if recipe.policy.precision == "bf16":
            residual_in_fp32(model)
        return model.to(ranks.device)

    # With an adapter a checkpoint's weights are merged; base weights and adapter are read apart.
    model = load(
        run.checkpoints.path(run.start) if run.start and recipe.policy.lora is None else source,
        "trained" if recipe.policy.lora is None else "values",
    )
    if recipe.policy.lora is not None:
        add_adapter(model, recipe.policy.lora, recipe.run.seed)
    reference = None
    if recipe.loss.kl_coef > 0.0 and recipe.policy.lora is None:
        # Sharded, all ranks hold a part of it, and codes of parts are not gathered: it stays a master that nobody trains.
        reference = load(source, "none" if sharded is None else "trained").requires_grad_(False)
    if recipe.policy.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training mode alone
        drop_nothing(model)
    learner = Learner(
        model, recipe.loss, recipe.learner, ranks, sharded=sharded,
        temperature=recipe.rollout.temperature, max_tokens=recipe.rollout.max_tokens, reference=reference,
    )  # fmt: skip
    if not run.start:
        check_forward(learner)
    return learner


def _check_vocabulary(prompts: Sequence[Prompt], run: Run) -> None:
    tokens = run.learner.model.config.vocab_size
    for prompt in prompts:
        if len(prompt.token_ids) < 2 and run.recipe.learner.mtp.weight:
            raise InputError(
                f"learner.mtp.weight: prompt '{prompt.id}' has one token, and multi-token prediction reads two; leave it out, or set the "
                "weight to 0"
            )
        if prompt.token_ids.max() >= tokens:
            raise InputError(
                f"policy.path: prompt '{prompt.id}' has token {prompt.token_ids.max()}, the policy knows tokens 0 to {tokens - 1}: "
                "tokenizer and weights do not belong together; save them together with save_pretrained"
            )


def _check_same_inputs(run: Run, source: Path, prompts: PromptSet | None) -> None:
    """A run goes on only with the policy and the prompts it began with: what the journal holds was sampled from these."""
    assert prompts is not None
    now = {"policy": policy_fingerprint(source), "prompts": _prompts_fingerprint(prompts.prompts)}
    for name, fingerprint in now.items():
        if run.journal.meta(name) not in (None, fingerprint):
            raise InputError(
                f"{name}: not what {run.folder.path} began with, though the recipe says the same; restore it, or choose another run.name"
            )
    run.journal.set_meta(**now)


def _note_rewards(run: Run) -> None:
    """Says which reward functions are not those that a run was scored with, as one that failed may have been mended, and keeps all their
    versions, the newest last: no one else takes its scores for those of one function."""
    seen: dict[str, str] = run.journal.meta(VERSIONS) or {}
    for name, version in reward_versions(run.recipe.rewards).items():
        before = seen.get(name, "").split()
        if before and before[-1] != version:
            run.display.say(f"rewards: '{name}' has changed since this run was last scored; from here on its scores are the new one's")
        if not before or before[-1] != version:
            seen[name] = " ".join([*before, version])
    run.journal.set_meta(**{VERSIONS: seen})


def _prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.id.encode() + b"\0" + prompt.token_ids.tobytes() + b"\0")
    return digest.hexdigest()


def _check_room(run: Run) -> None:
    parameters = [p for name, p in run.learner.model.named_parameters() if "lora_" not in name]
    weights = WEIGHT_BYTES[run.recipe.policy.precision] * sum(p.numel() for p in parameters)
    trained = sum(p.numel() for _, p in run.learner.optim.parameters)
    missing = run.recipe.checkpoint.keep + 1 - len(run.checkpoints.steps())
    check_room(run.folder.path, missing * (weights + trained * _state_bytes(run.recipe)))


def _state_bytes(recipe: TrainRecipe) -> int:
    """Bytes that a trained parameter takes in a checkpoint beside its weight: both moments, and a master that is not the weight."""
    precision, optimizer = recipe.policy.precision, recipe.learner.optimizer
    if recipe.policy.lora is not None:
        apart = WEIGHT_BYTES["fp32"]  # the adapter's own
    else:
        apart = 0 if precision == "fp32" or optimizer.masters == precision else WEIGHT_BYTES[optimizer.masters]
    return apart + 2 * WEIGHT_BYTES[optimizer.moments]


def _turns(run: Run) -> Turns | None:
    """Under `placement: colocate`, who has the GPUs: the engines, which are about to start, so the learner gives up what it can."""
    if run.recipe.rollout.placement != "colocate":
        return None
    turns = Turns(run.learner, run.recipe.rollout)
    turns.learner_ends()
    if not turns.frees:
        run.display.say(
            "rollout.placement colocate: engines stand still while the learner learns; there is no GPU on which memory is freed"
        )
    elif turns.offloads:
        run.display.say("rollout.placement colocate: the optimizer's state is in host memory while engines sample")
    return turns


def _sync(run: Run, manifest: Manifest | None, turns: Turns | None) -> WeightSync | NcclSync:
    """manifest: on rank 0, what every update brings."""
    engines = run.pool.engines if run.ranks.main else ()
    if turns is not None:
        return ColocatedSync(engines, manifest, turns)
    if run.recipe.rollout.weights == "nccl":
        return NcclSync(engines, manifest or {}, run.ranks)
    return WeightSync(engines, manifest)


def _manifest(learner: Learner, source: Path) -> dict[str, TensorSpec]:
    """What every weight update has to bring: all that the policy's files hold, as the learner has it."""
    manifest = {name: TensorSpec(dtype, shape) for name, dtype, shape in learner.specs()}
    for name, spec in read_manifest(source).items():
        if name not in manifest or manifest[name].shape != spec.shape:
            has = (
                f"has shape {manifest[name].shape} in the model"
                if name in manifest
                else "is no tensor of the model that transformers made of it"
            )
            raise InputError(f"policy.path: {source}: {name}, of shape {spec.shape}, {has}; the engines would keep their own")
    return manifest


def _open_rollouts(run: Run, source: Path, manifest: Manifest, prompts: PromptSet, max_model_len: int, stack: ExitStack) -> GroupStream:
    """Metrics, rewards and engines, opened in the order in which they can fail."""
    recipe, folder = run.recipe, run.folder.path
    run.metrics = MetricsFile(folder, recipe.log.trackers, recipe.run.name, recipe.model_dump(mode="json"))
    stack.callback(run.metrics.close)
    run.display.phase("starting rewards and engines")
    (folder / "logs").mkdir(exist_ok=True)
    run.scorer = stack.enter_context(Scorer(recipe.rewards, log_dir=folder / "logs"))
    engines = make_engines(
        recipe.rollout, recipe.policy, source, max_model_len, folder / "logs",
        returns_routes=recipe.loss.replay == "rollout", manifest=manifest, say=run.display.say,
    )  # fmt: skip
    run.pool = stack.enter_context(make_pool(recipe.rollout, engines, run.tokenizer, run.display.say))
    parts = (PromptStream(prompts.prompts, recipe.run.seed), run.pool, run.scorer, run.journal, run.tokenizer, recipe.rollout)
    named: dict[str, Any] = {"run": recipe.run.name, "seed": recipe.run.seed, "max_error_rate": recipe.rewards.max_error_rate}
    if recipe.rollout.max_staleness:
        return AheadStream(*parts, **named, steps=recipe.learner.steps)
    return GroupStream(*parts, **named)


def _restore(run: Run) -> None:
    """Optimizer, RNG, positions and files as they were after `run.start` steps."""
    torch.manual_seed(run.recipe.run.seed)
    state = run.checkpoints.load(run.start, run.learner) if run.start else {}
    run.learner.updates = state.get("updates", 0)
    run.learner.optim.steps = state.get("optimizer_steps", 0)
    if run.ranks.main:
        run.stream.stream.restore(run.start, state)
        run.seconds_before = state.get("seconds", 0.0)
        run.alarms = Alarms([part.key for part in run.recipe.rewards.shadow], state.get("alarms"))
        run.metrics.cut(run.start if run.start else -1)
        cut_completions(run.folder.path / "completions", run.start + 1)
        cut_router(run.folder.path / "router", run.start + 1)
        voided = run.journal.resume(run.start)
        if run.start:
            again = f"; {voided} groups used after it are used again" if voided else ""
            run.display.say(f"going on from {run.checkpoints.path(run.start)}{again}")


def _say_prompts(run: Run, prompts: PromptSet, held_out: PromptSet | None) -> None:
    for name, read in (("prompts", prompts), ("held-out prompts", held_out)):
        if read is not None:
            skipped = ", ".join(f"{count} {reason}" for reason, count in read.skipped.items())
            run.display.say(f"{len(read.prompts)} {name}" + (f" (left out: {skipped})" if skipped else ""))


def _watch_signals(run: Run, stack: ExitStack) -> None:
    """SIGTERM and Ctrl-C end the run after the step it is in, with a checkpoint."""

    def ask() -> None:
        run.asked_to_end = True

    stack.enter_context(asked_to_end(ask))
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # A scheduler tells the launcher to end, and accelerate's passes nothing on: its death is our SIGTERM (Linux).
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
