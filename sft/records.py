"""Rejection sampling's second half: from scored groups in a journal to a data set in a folder.

    groups -> select -> candidates -> clean -> mix -> Records, with rejected rows, preference pairs, report and card beside them

Everything here is a function of journal and recipe, so another selection costs no sampling. The order of rows is that of experts and
prompts, or the mixture's; no time, path of this machine, or random number enters a file, and the folder appears whole, by rename.
"""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.card import write_card
from data.clean import write_rejected
from data.cleaning import Cleaning, Rejection
from data.files import write_file, write_lines
from data.journal import Attempt, Journal
from data.recipe import resolved_yaml
from data.records import record_from_row, record_row, write_records
from data.rows import SourceRow
from data.select import Choice, in_window, is_right, pairs, pass_rate, preference_row, select
from data.values import Group, Messages, Prompt, Provenance, Record
from rewards.answers import find_answer
from rewards.versions import reward_versions
from rl.stream import RunStopped
from sft.curate_config import ORIGINAL, CurateRecipe
from sft.experts import Expert
from sft.mixture import REASON, Mixture
from sft.provenance import recipe_hash

CHUNK = 256
"""Groups in memory at a time."""
OPEN = "<think>"
FOLDER = "curated"
CANDIDATES, UNSELECTED = ".candidates.jsonl", ".unselected.jsonl"

Cleaned = tuple[Cleaning, Sequence[Rejection]]
"""What `Expert.clean` said of an expert's prompts."""


class Writer:
    """Writes `<run>/curated` from the journal."""

    def __init__(self, recipe: CurateRecipe, experts: Sequence[Expert], journal: Journal, run: Path):
        self.recipe = recipe
        self.experts = experts
        self.journal = journal
        self.run = run
        self.work = run / ".writing" / FOLDER  # under the name that the card will have
        self.counts: Counter[str] = Counter()
        self.versions = reward_versions(recipe.rewards)
        self.hash = recipe_hash(recipe)

    def write(self, cleaned: Sequence[Cleaned]) -> dict[str, Any]:
        """The whole folder, and what its report says."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        cleaning = Cleaning(self.recipe.clean, self._candidates, self.work)
        self._spool(cleaning.stages)
        mixture = Mixture(self.recipe.mix, self.recipe.run.seed, cleaning.kept) if self.recipe.mix is not None else None
        write_rejected(self.work / "rejected.parquet", self._rejections(cleaned, cleaning, mixture))
        if not cleaning.counts["kept"]:
            raise RunStopped(
                f"no row is left: of {self.counts['completions']:,} completions {self.counts['right']:,} were right, "
                f"{self.counts['selected']:,} were selected, and cleaning kept none; {self.work / 'rejected.parquet'} says why of each"
            )
        rows = mixture.rows if mixture else cleaning.kept
        write_records(self.work, lambda: (record_from_row(row.values) for row in rows()))
        hits = [hit for each, _ in cleaned for hit in each.hits] + cleaning.hits
        write_lines(self.work / "contamination.jsonl", (json.dumps(dataclasses.asdict(hit), ensure_ascii=False) for hit in hits))
        if self.recipe.pairs is not None:
            self._write_pairs()
        report = self._report(cleaned, cleaning, mixture)
        write_lines(self.work / "report.json", [json.dumps(report, indent=2, ensure_ascii=False)])
        write_lines(self.work / "recipe.yaml", resolved_yaml(self.recipe).splitlines())
        for spool in (CANDIDATES, UNSELECTED):
            (self.work / spool).unlink()
        write_card(self.work, self.recipe.licences)
        self._put_in_place()
        return report

    # --- groups and what is chosen of them ------------------------------------------------------------------------------

    def groups(self, expert: Expert) -> Iterator[tuple[Group, Attempt]]:
        """The groups of an expert in the order of its prompts; those of original responses after them."""
        names = [expert.name] + ([expert.name + ORIGINAL] if expert.config.original else [])
        for name in names:
            for position in expert.kept:
                for attempt in self.journal.attempts_at(name, position):
                    yield self._group(expert.prompts[position], attempt), attempt

    def _group(self, prompt: Prompt, attempt: Attempt) -> Group:
        completions, scores = self.journal.completions(attempt.group_id), self.journal.scores(attempt.group_id)
        assert len(completions) == len(scores) == attempt.size, f"group {attempt.group_id} is not complete"
        order = range(attempt.size)
        return Group(attempt.group_id, prompt, attempt.attempt, tuple(completions[i] for i in order), tuple(scores[i] for i in order))

    def _spool(self, filters: Sequence[str]) -> None:
        """What `select` keeps, as rows of records, and what it does not, with the reason; each into a file, group by group."""
        taken: Counter[tuple[str, str]] = Counter()
        with (self.work / CANDIDATES).open("w", encoding="utf-8") as kept, (self.work / UNSELECTED).open("w", encoding="utf-8") as others:
            for expert in self.experts:
                groups = self.groups(expert)
                while chunk := list(islice(groups, CHUNK)):
                    self._count(group for group, _ in chunk)
                    attempts = {group.id: attempt for group, attempt in chunk}
                    chosen, beyond = self._select([group for group, _ in chunk], expert, taken)
                    for choice in chosen:
                        self.counts["selected"] += 1
                        record = self._record(expert, choice, attempts[choice.group.id], filters)
                        kept.write(json.dumps(record_row(record), ensure_ascii=False) + "\n")
                    places = {(choice.group.id, choice.index) for choice in chosen}
                    for group, attempt in chunk:
                        for index in range(attempt.size):
                            if (place := (group.id, index)) not in places:
                                row = self._left_out(expert, group, index, attempt, place in beyond)
                                others.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _select(
        self, groups: Sequence[Group], expert: Expert, taken: Counter[tuple[str, str]]
    ) -> tuple[list[Choice], set[tuple[str, int]]]:
        """What `select` keeps of some groups, and the places of what `max_per_prompt` alone leaves out.

        `taken` counts completions by prompt over all experts; prompts of two sources are two, also where they share an id."""

        def answers(group: Group) -> list[str | None]:
            return [find_answer(expert.text(completion), group.prompt.text) for completion in group.completions]

        most = self.recipe.select.max_per_prompt
        config = self.recipe.select.model_copy(update={"max_per_prompt": None})
        # An original response stands alone: it has no pass rate to speak of, and nothing to be chosen from.
        alone = config.model_copy(update={"pass_rate": None, "rule": "all_correct"})
        source = expert.config.prompts.model_dump_json(include={"path", "task", "options", "split"})
        chosen: list[Choice] = []
        beyond: set[tuple[str, int]] = set()
        for group in groups:
            is_original = group.id.startswith(f"{expert.name}{ORIGINAL}/")
            wanted = select([group], alone if is_original else config, answers)
            room = len(wanted) if most is None else max(0, most - taken[source, group.prompt.id])
            chosen += wanted[:room]
            beyond.update((group.id, choice.index) for choice in wanted[room:])
            taken[source, group.prompt.id] += len(wanted[:room])
        return chosen, beyond

    def _left_out(self, expert: Expert, group: Group, index: int, attempt: Attempt, is_beyond: bool) -> dict[str, Any]:
        """A completion that is not selected, with the reason, as a row of UNSELECTED; `is_beyond`: chosen, but for `max_per_prompt`."""
        config, score = self.recipe.select, group.scores[index]
        rate = pass_rate(group, config)
        if is_beyond:
            reason, detail = "max_per_prompt", f"{config.max_per_prompt} of its prompt are taken"
        elif score.status in ("timeout", "error"):
            reason, detail = "failed_score", score.detail
        elif score.status == "unscored":
            reason, detail = "unscored", score.detail
        elif not is_right(group, index, config):
            reason, detail = "wrong", f"reward {score.value:g}; {score.detail}".rstrip("; ")
        elif not in_window(group, config):
            reason, detail = "pass_rate", f"{rate:.0%} of its group are right"
        else:
            reason, detail = "not_chosen", f"right, and {config.rule} chose others"
        messages = written_messages(group.prompt, expert, expert.text(group.completions[index]), attempt.slot.run.endswith(ORIGINAL))
        values = {"messages": messages, "group_id": group.id, "index": index, "expert": attempt.slot.run, "reward": score.value}
        return {"number": attempt.slot.position + 1, "id": group.prompt.id, "reason": reason, "detail": detail, "values": values}

    def _rejections(self, cleaned: Sequence[Cleaned], cleaning: Cleaning, mixture: Mixture | None) -> Iterator[Rejection]:
        """Every prompt and row that goes, with its reason; the mixture is asked last, of what cleaning has kept."""
        yield from (rejection for _, rejections in cleaned for rejection in rejections)
        yield from self._unselected()
        yield from cleaning.rejections()
        if mixture is not None and cleaning.counts["kept"]:
            yield from mixture.left_out()

    def _unselected(self) -> Iterator[Rejection]:
        with (self.work / UNSELECTED).open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                self.counts[f"unselected/{row['reason']}"] += 1
                source = SourceRow(row["values"]["expert"], row["number"], row["values"])
                yield Rejection(source, row["id"], row["reason"], row["detail"])

    def _count(self, groups: Iterator[Group]) -> None:
        config = self.recipe.select
        for group in groups:
            ok = [index for index, score in enumerate(group.scores) if score.status == "ok"]
            right = sum(is_right(group, index, config) for index in ok)
            failed = sum(score.status in ("timeout", "error") for score in group.scores)
            self.counts.update(
                groups=1, completions=len(group.scores), tokens=sum(len(c.token_ids) for c in group.completions),
                judged=len(ok), right=right, failed=failed, outside_window=not in_window(group, config),
            )  # fmt: skip

    # --- records --------------------------------------------------------------------------------------------------------

    def _candidates(self) -> Iterator[SourceRow]:
        with (self.work / CANDIDATES).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield SourceRow("candidates", number, json.loads(line))

    def _record(self, expert: Expert, choice: Choice, attempt: Attempt, filters: Sequence[str]) -> Record:
        group, completion = choice.group, choice.completion
        score = group.scores[choice.index]
        is_original = attempt.slot.run.endswith(ORIGINAL)
        return Record(
            written_messages(group.prompt, expert, expert.text(completion), is_original),
            Provenance(
                prompt_id=group.prompt.id,
                group_id=group.id,
                index=choice.index,
                expert=attempt.slot.run,
                expert_hash="" if is_original else expert.weights,
                seed=completion.seed,
                sampling=self._sampling(expert, attempt, is_original),
                rewards=self.versions,
                parts=score.parts,
                reward=score.value,
                pass_rate=pass_rate(group, self.recipe.select),
                filters=tuple(filters),
                recipe_hash=self.hash,
                tokens=len(completion.token_ids),
                source=expert.config.prompts.source,
                finish_reason=completion.finish_reason,
            ),
        )

    def _sampling(self, expert: Expert, attempt: Attempt, is_original: bool) -> dict[str, Any]:
        if is_original:
            return {"kind": "original"}
        config = expert.config
        rollout = config.rollout
        known: dict[str, Any] = {"kind": "run" if config.sampled else "expert", "system": config.system or config.prompts.system}
        if config.sampled:
            return known | {"run": config.sampled, "group_id": self.journal.meta(f"origin/{attempt.group_id}")}
        return known | {
            "engine": rollout.engine,
            "precision": config.precision,
            "group_size": rollout.group_size,
            "temperature": rollout.temperature,
            "max_tokens": rollout.max_tokens,
            "stop": rollout.stop,
            "path": config.path,
            "revision": config.revision,
        }

    def _write_pairs(self) -> None:
        wanted = self.recipe.pairs
        assert wanted is not None

        def rows() -> Iterator[dict[str, Any]]:
            for expert in self.experts:
                for group, attempt in self.groups(expert):
                    for pair in pairs([group], self.recipe.select, wanted.per_group, wanted.min_margin):
                        texts = [expert.text(completion) for completion in group.completions]
                        where = {"prompt_id": group.prompt.id, "group_id": group.id, "expert": attempt.slot.run, "margin": pair.margin}
                        yield preference_row(pair, texts) | where

        self.counts["pairs"] = sum(1 for _ in rows())
        if self.counts["pairs"]:
            write_file(self.work / "pairs.parquet", rows)

    # --- the report -----------------------------------------------------------------------------------------------------

    def _report(self, cleaned: Sequence[Cleaned], cleaning: Cleaning, mixture: Mixture | None) -> dict[str, Any]:
        counts = self.counts
        rejected = sum((each.counts for each in (*(c for c, _ in cleaned), cleaning)), Counter[str]())
        rejected.update({name.partition("/")[2]: n for name, n in counts.items() if name.startswith("unselected/")})
        rejected[REASON] = mixture.left_out_count if mixture else 0
        reasons = {reason: n for reason, n in sorted(rejected.items()) if reason not in ("read", "kept") and n}
        stages = [
            ["prompts", sum(c.counts["read"] for c, _ in cleaned)],
            ["prompts kept", sum(c.counts["kept"] for c, _ in cleaned)],
            ["completions", counts["completions"]],
            ["judged", counts["judged"]],
            ["right", counts["right"]],
            ["selected", counts["selected"]],
            ["kept", cleaning.counts["kept"]],
        ]
        mix = None if mixture is None else mixture.report()
        if mix is not None:
            stages.append(["mixed", mix["rows"]])
        return {
            "stages": stages,
            **({"mix": mix} if mix else {}),
            "rejected": reasons,
            "counts": {name: counts[name] for name in sorted(counts) if "/" not in name},
            "experts": {expert.name: {"weights": expert.weights, "prompts": len(expert.kept)} for expert in self.experts},
            "rewards": self.versions,
            "recipe_hash": self.hash,
        }

    def _put_in_place(self) -> None:
        """The new folder for the old one: two renames, so that no reader sees a half of each."""
        place, old = self.run / FOLDER, self.run / ".writing" / "old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            os.replace(place, old)
        os.replace(self.work, place)
        shutil.rmtree(self.run / ".writing")


def written_messages(prompt: Prompt, expert: Expert, text: str, is_original: bool = False) -> Messages:
    """The row that is trained on: <problem, original response>, or <system prompt, problem, expert response> with its system prompt
    kept or dropped."""
    messages = [{"role": "user", "content": prompt.prompt}] if isinstance(prompt.prompt, str) else list(prompt.prompt)
    added = expert.config.system is not None and messages[0] == {"role": "system", "content": expert.config.system}
    if added and (is_original or not expert.config.keep_system):
        messages = messages[1:]
    # A template that opens the reasoning itself leaves the tag with the prompt; the row would lose it.
    opened = prompt.text.rstrip().endswith(OPEN) and not is_original
    return [*messages, {"role": "assistant", "content": f"{OPEN}\n{text}" if opened else text}]
