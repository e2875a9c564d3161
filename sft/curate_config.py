"""The recipe of curation: which experts sample which prompts, what judges them, and what is kept.

Read by `sft.curate` and `sft.why`. `select` and `clean` are defined in `data/`, `rewards` in `rewards/`. `select`, `clean`, `mix` and
what is written may change while nothing is sampled again: completions and scores stand in the journal.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from data.clean_config import CleanConfig
from data.prompt_config import PromptsConfig
from data.recipe import Section, nearest
from data.select import SelectConfig
from rewards.config import RewardsConfig
from rl.config import LearnerConfig, PolicyConfig, RolloutConfig, RunConfig, TrainRecipe

ORIGINAL = "/original"
"""Ends the name under which an expert's original responses stand in journal, records and mixture."""


class ExpertConfig(Section):
    """A checkpoint, what it is asked, and how."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.\-]*$")
    """Names it in records and in the journal."""
    path: str
    """Model folder or hub id; with `sampled`, the policy whose tokenizer the run used."""
    revision: str | None = None
    """Revision of a hub id."""
    precision: str = Field("fp32", pattern="^(fp32|bf16)$")
    """In which its engine computes: fp32 or bf16."""
    prompts: PromptsConfig
    """Its domain. Rows with a column `answer` (or what its rewards need) can be judged."""
    system: str | None = None
    """System prompt that it is sampled with: the row shape <system prompt, problem, expert response> (arXiv:2412.19437, section 5.1)."""
    keep_system: bool = False
    """Whether written rows keep that system prompt; without it, the trained policy answers so unasked."""
    original: str | None = None
    """Column with a response that came with the problem: it is judged too, and kept as <problem, original response> if it is right."""
    rollout: RolloutConfig = RolloutConfig()
    """Engine and sampling; `group_size` completions of each prompt."""
    sampled: str | None = None
    """Folder of a run of rl.train: what it has sampled already is taken instead, its scores too if it had these rewards."""
    since_step: int = Field(0, ge=0)
    """With `sampled`: groups of this step and later ones, whose policy was better trained."""

    @model_validator(mode="after")
    def _one_turn(self) -> "ExpertConfig":
        if self.rollout.conversation is not None:
            raise ValueError("rollout.conversation: a record cannot say what a tool wrote, and SFT would learn it; leave it out")
        return self

    @model_validator(mode="after")
    def _sampled_alone(self) -> "ExpertConfig":
        if self.sampled is None and self.since_step:
            raise ValueError("since_step goes with `sampled`, the folder of a run")
        if self.sampled is not None and self.original is not None:
            raise ValueError("`sampled` takes what a run has sampled; name `original` with an expert of its own")
        return self


class MixConfig(Section):
    """How much of each expert is written, by its name; its original responses are a source of their own, `NAME/original`.

    Files of other rows are mixed in afterwards by `python -m data.mix`, reasoning to general 3:1 for one.
    """

    weights: dict[str, float] = {}
    """Expert -> its weight; together they take as much as there is, or `total`."""
    counts: dict[str, int] = {}
    """Expert -> how much is taken of it; instead of weights."""
    unit: Literal["rows", "tokens"] = "rows"
    """What weights and counts count; tokens are those of the completion, as its expert's tokenizer has them."""
    total: int | None = Field(None, ge=1)
    """With weights: units of the mixture; null is as much as there is without using a row twice."""
    repeat: bool = False
    """Whether rows are used again where an expert has too few, as seldom as can be."""

    @model_validator(mode="after")
    def _weights_or_counts(self) -> "MixConfig":
        if bool(self.weights) == bool(self.counts):
            raise ValueError("give either `weights` or `counts`, one number for each expert, and not both")
        if self.counts and self.total is not None:
            raise ValueError("`total` goes with weights; counts make their own total")
        for name, share in (self.weights or self.counts).items():
            if not 0 < share < float("inf"):
                raise ValueError(f"'{name}' has {share:g}; a weight or count is above 0")
        return self

    def check_names(self, names: Sequence[str]) -> None:
        """ValueError unless each of `names` has its number, and nobody else has one."""
        given = self.weights or self.counts
        for name in given:
            if name not in names:
                raise ValueError(f"mix: no expert '{name}'{nearest(name, names)}")
        for name in names:
            if name not in given:
                raise ValueError(f"mix: '{name}' has no number; give it one, or take its expert out")


class PairsConfig(Section):
    """Preference pairs for reward models, in trl's format: `curated/pairs.parquet`."""

    per_group: int = Field(1, ge=1)
    """Best against worst, second best against second worst, and so on."""
    min_margin: float = Field(1e-6, gt=0.0)
    """Least difference of two rewards."""


class CurateRecipe(Section):
    """`sft.curate`: experts -> completions -> scores -> selection -> cleaning -> Records."""

    run: RunConfig
    experts: list[ExpertConfig] = Field(min_length=1)
    experts_at_once: int = Field(1, ge=1)
    """Experts whose engines are loaded at the same time."""
    rewards: RewardsConfig
    select: SelectConfig = SelectConfig()
    clean: CleanConfig = CleanConfig()
    """Asked of prompts before they are sampled, and of records after; `fim` of records alone."""
    mix: MixConfig | None = None
    """Null writes all rows, in the order of experts and prompts."""
    pairs: PairsConfig | None = None
    licences: dict[str, str] = {}
    """Source of prompts (path, hub id, or `task arithmetic`) -> its licence, for the card."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of an hf engine; null: all cores but not more than 16."""

    @model_validator(mode="after")
    def _names(self) -> "CurateRecipe":
        names = [expert.name for expert in self.experts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"experts: the name '{name}' stands twice; give each expert its own")
        if self.mix is not None:
            self.mix.check_names([*names, *(expert.name + ORIGINAL for expert in self.experts if expert.original)])
        return self

    def expert(self, name: str) -> ExpertConfig | None:
        return next((expert for expert in self.experts if expert.name == name), None)

    def sampling_recipe(self, expert: ExpertConfig) -> TrainRecipe:
        """An expert as the policy of a recipe that rl's functions take."""
        return TrainRecipe(
            run=self.run,
            policy=PolicyConfig(path=expert.path, revision=expert.revision, precision=expert.precision),  # type: ignore[arg-type]
            prompts=expert.prompts.model_copy(update={"system": expert.system or expert.prompts.system}),
            rollout=expert.rollout,
            rewards=self.rewards,
            learner=LearnerConfig(threads=self.threads),
        )


FREE = ("select", "clean", "mix", "pairs", "licences", "experts_at_once", "threads", "rewards.max_error_rate", "rewards.workers")
"""What may differ when a run goes on: nothing is sampled or scored again for it."""
