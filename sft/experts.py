"""An expert at work: its prompts, and the groups that are wanted of it, whoever gives their completions.

Three sources, one form (Job). The expert's engine samples what nobody has; a training run may have sampled it already (`sampled`,
sft/sampled.py); or the problem came with a response (`original`). What is given and not sampled here has a mask of 0, so that the
account of sampled tokens stays true.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.clean_config import CleanConfig
from data.cleaning import Cleaning, Rejection
from data.journal import Journal, Slot
from data.recipe import InputError
from data.rows import SourceRow
from data.values import Completion, Prompt, Score, completion_seed, group_id
from rewards.config import RewardsConfig
from rewards.versions import META, changed_reward, reward_versions
from rl.inputs import read_prompt_sets
from rl.policy import load_tokenizer, policy_folder
from sft.curate_config import ORIGINAL, CurateRecipe, ExpertConfig
from sft.provenance import weight_hash
from sft.sampled import SampledRun, as_given


@dataclass(frozen=True)
class Job:
    """A group that is wanted."""

    slot: Slot
    prompt: Prompt
    size: int
    given: Sequence[Completion] | None = None
    """Its completions, if they are not to be sampled."""
    scores: Sequence[Score] | None = None
    """Their scores, if they are not to be judged again."""
    origin: str | None = None
    """The group's id in the run that sampled it."""


class Expert:
    """One expert of a recipe with its prompts read; loads no weights."""

    def __init__(self, recipe: CurateRecipe, config: ExpertConfig):
        self.config = config
        self.name = config.name
        self.recipe = recipe.sampling_recipe(config)
        assert self.recipe.policy.path is not None
        self.folder = policy_folder(self.recipe.policy.path, self.recipe.policy.revision)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.folder)
        (read,), self.max_model_len = read_prompt_sets(self.recipe, [self.recipe.prompts], self.tokenizer)
        self.prompts: Sequence[Prompt] = read.prompts
        self._check_rows(recipe)
        self.kept: list[int] = list(range(len(self.prompts)))
        """Places of the prompts that cleaning left; a prompt keeps its place whatever goes before it."""
        digest = hashlib.blake2b(f"{recipe.run.seed} {config.name}".encode(), digest_size=4).digest()
        self.seed = int.from_bytes(digest, "big")
        """Of its completions: two experts that are asked the same draw other random numbers."""

    @cached_property
    def weights(self) -> str:
        return weight_hash(self.folder)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What must not change while a journal holds completions of it."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(prompt.id.encode() + b"\0" + prompt.token_ids.tobytes() + b"\0")
        return {"policy": self.weights, "prompts": digest.hexdigest()}

    def text(self, completion: Completion) -> str:
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def completion_seed(self, prompt: Prompt, attempt: int, index: int) -> int:
        return completion_seed(self.seed, prompt.id, attempt, index)

    def _check_rows(self, recipe: CurateRecipe) -> None:
        """InputError, before anything is sampled, for a row without the original response that is wanted, or with an unknown route."""
        column = self.config.original
        for prompt in self.prompts:
            if column is not None:
                response = prompt.columns.get(column)
                if not isinstance(response, str) or not response.strip():
                    raise InputError(
                        f"experts: {self.name}: original: prompt '{prompt.id}' has no text in the column '{column}' ({response!r:.40}); "
                        "give it one, or leave `original` out"
                    )
            try:
                recipe.rewards.parts_for(prompt.columns)
            except ValueError as error:
                raise InputError(f"experts: {self.name}: prompt '{prompt.id}': {error}; add the route, or correct the row") from None

    # --- before sampling ------------------------------------------------------------------------------------------------

    def clean(self, config: CleanConfig, work: Path) -> tuple[Cleaning, list[Rejection]]:
        """Decontaminates and dedups the prompts; `kept` are those that stay."""
        cleaning = Cleaning(for_prompts(config), lambda: map(self._row, range(len(self.prompts))), work)
        rejections = list(cleaning.rejections())
        self.kept = [row.number - 1 for row in cleaning.kept()]
        return cleaning, rejections

    def _row(self, position: int) -> SourceRow:
        prompt = self.prompts[position]
        gold = {name: prompt.columns[name] for name in ("answer", "solution") if name in prompt.columns}
        return SourceRow(f"{self.name}: {self.config.prompts.source}", position + 1, {"id": prompt.id, "prompt": prompt.prompt, **gold})

    # --- the groups -----------------------------------------------------------------------------------------------------

    def jobs(self) -> Iterator[Job]:
        """The groups that are wanted, in an order that depends on recipe and inputs alone."""
        if self.config.sampled is not None:
            yield from self._sampled(SampledRun(Path(self.config.sampled), self.config.since_step))
            return
        for position in self.kept:
            prompt = self.prompts[position]
            yield Job(Slot(self.name, position, prompt.id), prompt, self.config.rollout.group_size)
        if self.config.original is not None:
            for position in self.kept:
                yield self._original(position, self.config.original)

    def _original(self, position: int, column: str) -> Job:
        prompt = self.prompts[position]
        slot = Slot(self.name + ORIGINAL, position, prompt.id)
        return Job(slot, prompt, 1, [self._given(slot, 0, prompt.columns[column], "original")])

    def _given(self, slot: Slot, index: int, text: str, engine: str, finish_reason: str = "stop") -> Completion:
        """A text that is not sampled here, as a completion."""
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        return Completion(
            prompt_id=slot.prompt_id, group_id=group_id(slot.run, slot.prompt_id, slot.nth), index=index, attempt=slot.nth, seed=0,
            token_ids=ids, mask=np.zeros(len(ids), np.uint8), engine_logp=np.zeros(len(ids), np.float32),
            policy_version=np.zeros(len(ids), np.int32), finish_reason=finish_reason, engine=engine,  # type: ignore[arg-type]
        )  # fmt: skip

    def _sampled(self, run: SampledRun) -> Iterator[Job]:
        """What a run of rl.train has sampled, in the order of its prompts."""
        places = {self.prompts[position].id: position for position in self.kept}
        ours = run.same_rewards(self.recipe)
        nth: dict[str, int] = defaultdict(int)
        for group in run:
            prompt_id = group.attempt.slot.prompt_id
            if prompt_id not in places:
                continue
            slot = Slot(self.name, places[prompt_id], prompt_id, nth[prompt_id])
            nth[prompt_id] += 1
            if group.completions is not None:
                given = [as_given(c, group_id(slot.run, prompt_id, slot.nth), slot.nth) for c in group.completions]
            else:
                given = [self._given(slot, i, row["completion"], row["engine"], row["finish_reason"]) for i, row in enumerate(group.texts)]
            scores = group.scores if ours else None
            yield Job(slot, self.prompts[slot.position], len(given), given, scores, group.attempt.group_id)


def for_prompts(config: CleanConfig) -> CleanConfig:
    """What of `clean` is asked of prompts before sampling: duplicates and contamination. The filters judge what is written."""
    return CleanConfig(exact=config.exact, near=config.near, against=config.against, max_chars=10**9, max_repeated=1.0)


def claim_inputs(journal: Journal, experts: Sequence[Expert]) -> None:
    """A curation goes on only with the weights and prompts that it began with: what the journal holds was sampled from these."""
    for expert in experts:
        held = journal.meta(f"expert/{expert.name}")
        for what, now in expert.fingerprint.items():
            if held is not None and held[what] != now:
                raise InputError(
                    f"experts: {expert.name}: the {what} {'are' if what == 'prompts' else 'is'} not what {journal.path.parent} began with, "
                    "though the recipe says the same; restore them, or choose another run.name"
                )
    journal.set_meta(**{f"expert/{expert.name}": expert.fingerprint for expert in experts})


def claim_rewards(journal: Journal, rewards: RewardsConfig, experts: Sequence[Expert]) -> None:
    """A curation goes on only with the reward functions whose scores its journal holds; without a score any may begin."""
    versions = reward_versions(rewards)
    changed = changed_reward(journal, versions)
    names = [name for expert in experts for name in (expert.name, expert.name + ORIGINAL)]
    if changed is not None and any(journal.scores(group) for name in names for group in journal.unused(name)):
        raise InputError(
            f"rewards: '{changed}' has changed since {journal.path.parent} was scored; restore it, or choose another run.name to score anew"
        )
    journal.set_meta(**{META: versions})
