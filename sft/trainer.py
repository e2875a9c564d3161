"""The home of trl in this package: rows and a policy in, a trained model folder out.

trl's SFTTrainer does the training: loss on the completion alone, the mean over all its tokens. What stands here is what trl
leaves open. Every setting that its defaults would choose by machine is spelled out (precision, auxiliary loss, checkpointing).
The model folder is written at the end from the weights in memory, aside and then renamed: a `final` that exists is whole. There
is no resume through transformers.Trainer, whose loader drops trained experts (transformers issue 48805); a cold start takes
minutes, so a run that was stopped begins again.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from data.recipe import InputError
from rl.policy import load_model, load_tokenizer, policy_folder
from sft.config import SftRecipe
from sft.init import init_policy
from sft.ranks import ranks

REPORTS = 10
"""Lines of progress that a run prints."""

Policy = tuple[PreTrainedModel, PreTrainedTokenizerBase]

# Their bars would fill a log; the lines of _Log say how far a run is.
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()


def train(recipe: SftRecipe, policy: Policy, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Trains on rows {prompt, completion}, writes `<folder>/metrics.jsonl` and `<folder>/final`, returns the last metrics.

    Collective: every rank calls it, rank 0 writes.
    """
    started = time.monotonic()
    torch.set_num_threads(recipe.sft.threads or min(os.cpu_count() or 1, 16))
    model, tokenizer = policy
    arguments = _trl_arguments(recipe, folder)
    routing = {name: getattr(model.config, name, None) for name in ("output_router_logits", "router_aux_loss_coef")}
    if routing["router_aux_loss_coef"] is not None:
        arguments.router_aux_loss_coef = recipe.sft.router_aux_loss_coef
    log = _Log(folder, recipe.sft.steps)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[log]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # trl wrote its auxiliary loss into the model's config; how a policy was trained is not what it is.
    for name, value in routing.items():
        if value is not None:
            setattr(model.config, name, value)
    save(trainer, model, tokenizer, folder / "final")
    return {**log.last, "seconds": round(time.monotonic() - started, 1)}


def load_policy(recipe: SftRecipe) -> Policy:
    """The recipe's policy with fp32 master weights, and its tokenizer.

    Raises InputError if `init` is no architecture, if `path` cannot be loaded, or if a dense policy should balance experts.
    """
    policy = recipe.policy
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
    return model, tokenizer


def save(trainer: SFTTrainer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes the trained weights, sharded or not, as a folder that transformers and vLLM load; collective."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        aside = path.with_name(f"{path.name}.partial")
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        aside.rename(path)
    trainer.accelerator.wait_for_everyone()


def _trl_arguments(recipe: SftRecipe, folder: Path) -> TrlConfig:
    sft = recipe.sft
    on_cpu = not torch.cuda.is_available()
    return TrlConfig(
        output_dir=str(folder),
        seed=recipe.run.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        bf16=recipe.policy.precision == "bf16",
        gradient_checkpointing=False,
        max_steps=sft.steps,
        per_device_train_batch_size=sft.batch_size // ranks(),
        learning_rate=sft.lr,
        lr_scheduler_type=sft.schedule,
        warmup_steps=sft.warmup_steps,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=sft.max_grad_norm,
        max_length=sft.max_length,
        completion_only_loss=True,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


class _Log(TrainerCallback):
    """One object a step in metrics.jsonl, and a few lines of progress."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.every = max(1, steps // REPORTS)
        self.last: dict[str, Any] = {}
        self.step_began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self.last = {"step": state.global_step, **logs, "time/step_s": time.monotonic() - self.step_began}
        with self.path.open("a") as file:
            file.write(json.dumps(self.last) + "\n")
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            print(
                f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.3f}  "
                f"right tokens {logs['mean_token_accuracy']:.1%}  {self.last['time/step_s']:.2f} s a step",
                flush=True,
            )
