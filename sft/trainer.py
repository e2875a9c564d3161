"""The home of trl in this package: token rows and a policy in, a trained model folder out.

trl's SFTTrainer does the training: loss on what an assistant wrote, the mean over all its tokens. What stands here is what trl leaves
open. Every setting that its defaults would choose by machine is spelled out (precision, auxiliary loss, checkpointing). With
`packing` several rows share a sequence; their positions begin anew, from which transformers builds a mask that lets no row see
another, so a row's loss is the same packed and alone. The model folder is written at the end from the weights in memory, aside and
then renamed: a `final` that exists is whole.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from data.recipe import InputError
from rl.command import asked_to_end
from rl.lora import add_adapter
from rl.metrics_file import MetricsFile
from rl.mtp import attach, mtp_layer
from rl.policy import checkpoint_views, load_model, load_tokenizer, policy_folder, save_policy
from rl.run import Interrupted
from rl.shard import wanted
from sft.checkpoint import Resumable, newest, remove_checkpoints
from sft.config import SftRecipe
from sft.init import init_policy
from sft.mtp import WithMtp
from sft.ranks import ranks
from sft.tokens import TokenRows, tokenise

REPORTS = 10
"""Lines of progress that a run prints."""

Policy = tuple[PreTrainedModel, PreTrainedTokenizerBase]

# Their bars would fill a log; the lines of _Log say how far a run is.
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()


class ResumableTrainer(Resumable, SFTTrainer):
    """trl's trainer with checkpoints that hold every expert."""


class MtpTrainer(WithMtp, ResumableTrainer):
    """The same, with the loss of multi-token prediction."""


def train(recipe: SftRecipe, policy: Policy, rows: TokenRows, folder: Path) -> dict[str, Any]:
    """Trains, writes `<folder>/metrics.jsonl` and `<folder>/final`, returns the last metrics; goes on from a checkpoint in the folder.

    Collective: every rank calls it, rank 0 writes. Raises Interrupted after SIGTERM or Ctrl-C, with a checkpoint left.
    """
    started = time.monotonic()
    torch.set_num_threads(recipe.sft.threads or min(os.cpu_count() or 1, 16))
    model, tokenizer = policy
    routing = {name: getattr(model.config, name, None) for name in ("output_router_logits", "router_aux_loss_coef")}
    trainer = make_trainer(recipe, policy, rows, folder)
    log, asked = _Log(folder), _AskedToEnd(trainer)
    trainer.add_callback(log)
    checkpoint = newest(folder / "checkpoints", trainer.data_fingerprint, ranks())
    with asked_to_end(asked.ask):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"asked to end after step {trainer.state.global_step}; start again with the same command to go on")
    # trl wrote its auxiliary loss into the model's config; how a policy was trained is not what it is.
    for name, value in routing.items():
        if value is not None:
            setattr(model.config, name, value)
    save(trainer, model, tokenizer, folder / "final")
    result = {**log.last, "steps": trainer.state.max_steps, "rows": len(rows.rows), "rows_skipped": rows.skipped}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def make_trainer(recipe: SftRecipe, policy: Policy, rows: TokenRows, folder: Path) -> ResumableTrainer:
    """trl's trainer as the recipe says; its checkpoints go to `<folder>/checkpoints`."""
    model, tokenizer = policy
    arguments = _trl_arguments(recipe, folder, rows)
    if getattr(model.config, "router_aux_loss_coef", None) is not None:
        arguments.router_aux_loss_coef = recipe.sft.router_aux_loss_coef
    data = datasets.Dataset.from_list(rows.rows)
    kind = MtpTrainer if recipe.sft.mtp_weight else ResumableTrainer
    trainer = kind(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    if isinstance(trainer, MtpTrainer):
        trainer.mtp_weight = recipe.sft.mtp_weight
    trainer.remove_callback(PrinterCallback)
    trainer.data_fingerprint = _fingerprint(rows)
    return trainer


def _check_sharding() -> None:
    """InputError where accelerate would not shard as its config says, or would with FSDP of the first version."""
    ranks_are = PartialState(cpu=not torch.cuda.is_available()).distributed_type
    if ranks_are in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError("accelerate config: FSDP, and accelerate shards on several accelerators alone; launch without it here")
    version = FullyShardedDataParallelPlugin().fsdp_version  # reads what accelerate launch has set
    if version != 2:
        raise InputError(f"accelerate config: fsdp_version is {version}; checkpoints and adapters are those of FSDP2, set it to 2")


def load_policy(recipe: SftRecipe) -> Policy:
    """The recipe's policy with fp32 master weights, its adapter if it has one, and its tokenizer.

    Raises InputError if `init` is no architecture, if `path` cannot be loaded, if a dense policy should balance experts, or if sharding
    is wanted where there is none.
    """
    if wanted():
        _check_sharding()
    policy = recipe.policy
    # With it ranks but the first would hold nothing until accelerate hands the weights out; here each reads its own.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if policy.init is not None:
        assert policy.tokenizer is not None
        model, tokenizer = init_policy(policy.init, policy.tokenizer, recipe.run.seed)
    else:
        assert policy.path is not None
        folder = policy_folder(policy.path, policy.revision)
        model = load_model(folder, torch.float32, attention_name="sdpa")
        tokenizer = load_tokenizer(folder)
    coefficient = recipe.sft.router_aux_loss_coef
    if coefficient and not hasattr(model.config, "router_aux_loss_coef"):
        kind = type(model).__name__
        raise InputError(f"sft.router_aux_loss_coef: {coefficient:g}, but {kind} has no experts to balance; leave it out")
    _prepare_mtp(recipe, model)
    if policy.lora is not None:
        add_adapter(model, policy.lora, recipe.run.seed)
    return model, tokenizer


def _prepare_mtp(recipe: SftRecipe, model: PreTrainedModel) -> None:
    """The multi-token prediction module is trained, and made where there is none; or it stays as it is."""
    weight, layer = recipe.sft.mtp_weight, mtp_layer(model)
    if weight and (recipe.policy.lora is not None or wanted()):
        raise InputError(f"sft.mtp_weight: {weight:g}, but with policy.lora or FSDP the module is not trained yet; set it to 0")
    if weight and layer is None:
        attach(model, seed=recipe.run.seed)
    elif layer is not None:
        layer.requires_grad_(weight > 0)


def token_rows(recipe: SftRecipe, policy: Policy, rows: list[dict[str, Any]]) -> TokenRows:
    """The rows as tokens, none longer than the policy's context; InputError where one is that may not be skipped."""
    model, tokenizer = policy
    if not isinstance(rows[0].get("prompt"), str) and tokenizer.chat_template is None:
        raise InputError("data: the rows are chats, and the policy's tokenizer has no chat template; give rows of text, or add one")
    context = getattr(model.config, "max_position_embeddings", None)
    limit = recipe.sft.max_length or context
    if context is not None and limit > context:
        raise InputError(f"sft.max_length: {limit} is more than the policy's context of {context} tokens")
    if recipe.sft.packing and limit is None:
        raise InputError("sft.max_length: missing, and packing needs to know how long a sequence is")
    return tokenise(rows, tokenizer, limit, recipe.sft.too_long, marked_template)


def marked_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, or trl's of the same model with marks around what an assistant writes; ValueError where trl has none."""
    template = tokenizer.chat_template
    return template if has_generation_markers(template) else get_training_chat_template(tokenizer)


def save(trainer: ResumableTrainer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes the trained weights, adapters merged, as a folder that transformers and vLLM load; collective.

    Sharded weights are gathered one tensor at a time, so every rank walks through them.
    """
    aside = path.with_name(f"{path.name}.partial")
    if trainer.accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        save_policy(aside, checkpoint_views(model), model, tokenizer)
        aside.rename(path)
        remove_checkpoints(path.with_name("checkpoints"))
    elif trainer.is_fsdp_enabled:
        for _ in checkpoint_views(model):
            pass
    trainer.accelerator.wait_for_everyone()


def _trl_arguments(recipe: SftRecipe, folder: Path, rows: TokenRows) -> TrlConfig:
    sft = recipe.sft
    on_cpu = not torch.cuda.is_available()
    falls_to = sft.schedule == "cosine" and sft.min_lr > 0
    return TrlConfig(
        output_dir=str(folder / "checkpoints"),
        seed=recipe.run.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        bf16=recipe.policy.precision == "bf16",
        gradient_checkpointing=False,
        max_steps=sft.steps or -1,
        num_train_epochs=sft.epochs,
        per_device_train_batch_size=sft.batch_size // ranks(),
        learning_rate=sft.lr,
        lr_scheduler_type="cosine_with_min_lr" if falls_to else sft.schedule,
        lr_scheduler_kwargs={"min_lr": sft.min_lr} if falls_to else None,
        warmup_steps=sft.warmup_steps,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=sft.max_grad_norm,
        max_length=(sft.max_length or rows.longest) if sft.packing else None,
        packing=sft.packing,
        packing_strategy="bfd",
        completion_only_loss=True,
        save_strategy="steps" if recipe.checkpoint.every else "no",
        save_steps=recipe.checkpoint.every or 1,
        save_total_limit=recipe.checkpoint.keep,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


def _fingerprint(rows: TokenRows) -> str:
    digest = hashlib.sha256()
    for row in rows.rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


class _AskedToEnd(TrainerCallback):
    """SIGTERM and Ctrl-C end training after the step it is in, with a checkpoint; every rank hears of it."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.accelerator = trainer.accelerator
        self.asked = False
        trainer.add_callback(self)

    def ask(self) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        flag = torch.tensor(float(self.asked), device=self.accelerator.device)
        if self.accelerator.reduce(flag, "sum").item():
            control.should_save = True
            control.should_training_stop = True


class _Log(TrainerCallback):
    """One object a step in metrics.jsonl, and a few lines of progress."""

    def __init__(self, folder: Path) -> None:
        self.file = MetricsFile(folder, (), "", {})
        self.last: dict[str, Any] = {}
        self.step_began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.file.cut(state.global_step)
            if state.global_step:
                print(f"going on after step {state.global_step}", flush=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self.last = {"step": state.global_step, **logs, "time/step_s": time.monotonic() - self.step_began}
        self.file.write(self.last)
        if state.global_step % max(1, state.max_steps // REPORTS) == 0 or state.global_step == state.max_steps:
            print(
                f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.3f}  "
                f"right tokens {logs['mean_token_accuracy']:.1%}  {self.last['time/step_s']:.2f} s a step",
                flush=True,
            )
