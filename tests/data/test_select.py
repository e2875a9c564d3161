"""Selection, by hand: every rule on groups of which one can see what is right."""

import numpy as np
import pytest
from pydantic import ValidationError

from data.select import Choice, SelectConfig, all_correct, diverse, in_window, pairs, pass_rate, preference_row, select
from data.values import Completion, Group, Prompt, Score

FAILED = Score(None, "timeout", detail="x: 5 s")
UNSCORED = Score(None, "unscored")


def group(*scores: float | Score, prompt: str = "p", tokens: list[list[int]] | None = None, attempt: int = 0) -> Group:
    """A group with these scores; token ids are given, or completion i has i + 1 tokens."""
    tokens = tokens or [[7] * (i + 1) for i in range(len(scores))]
    completions = tuple(
        Completion(
            prompt, f"run/{prompt}/{attempt}", i, attempt, i, np.array(ids, np.int32), np.ones(len(ids), np.uint8),
            np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), "stop", "e",
        )
        for i, ids in enumerate(tokens)
    )  # fmt: skip
    judged = tuple(score if isinstance(score, Score) else Score(score) for score in scores)
    return Group(f"run/{prompt}/{attempt}", Prompt(prompt, prompt, prompt, np.zeros(1, np.int32)), attempt, completions, judged)


def kept(groups: list[Group], answers=None, **config) -> list[int]:
    return [choice.index for choice in select(groups, SelectConfig(**config), answers)]


def test_all_correct_keeps_what_is_right_and_neither_failed_nor_wrong():
    assert sorted(kept([group(1.0, 0.0, FAILED, 1.0, UNSCORED)])) == [0, 3]


def test_failed_scores_are_neither_right_nor_wrong_in_the_pass_rate():
    config = SelectConfig()
    assert pass_rate(group(1.0, 0.0, FAILED, FAILED), config) == 0.5
    assert pass_rate(group(1.0, FAILED, FAILED), config) == 1.0
    assert pass_rate(group(FAILED, UNSCORED), config) is None


def test_the_window_drops_what_is_never_or_always_solved_and_what_cannot_be_judged():
    config = SelectConfig(pass_rate=(0.01, 0.99))
    groups = [group(0.0, 0.0), group(1.0, 0.0), group(1.0, 1.0), group(FAILED), group(1.0, FAILED)]
    assert [in_window(g, config) for g in groups] == [False, True, False, False, False]
    assert [choice.group is groups[1] for choice in select(groups, config)] == [True]


def test_the_windows_bounds_belong_to_it():
    assert in_window(group(1.0, 0.0), SelectConfig(pass_rate=(0.5, 0.5)))


def test_best_of_n_takes_the_highest_reward_even_if_none_is_right():
    assert kept([group(0.2, 0.7, 0.5)], rule="best_of_n") == [1]
    assert kept([group(FAILED, -3.0)], rule="best_of_n") == [1]
    assert kept([group(FAILED, UNSCORED)], rule="best_of_n") == []


def test_top_k_is_in_the_order_of_rewards():
    assert kept([group(0.2, 0.7, FAILED, 0.5)], rule="top_k", k=2) == [1, 3]
    assert kept([group(0.2, 0.7)], rule="top_k", k=9) == [1, 0]


def test_the_shortest_correct_one_is_shortest_by_tokens_among_the_right_ones():
    tokens = [[1], [1, 2, 3, 4], [1, 2, 3], [1, 2]]
    assert kept([group(0.0, 1.0, 1.0, FAILED, tokens=tokens)], rule="shortest_correct") == [2]
    assert kept([group(0.0, 1.0, 1.0, 1.0, tokens=tokens)], rule="shortest_correct", k=2) == [3, 2]


def test_correct_at_is_where_right_begins():
    assert kept([group(0.5, 0.9, 0.79)], correct_at=0.8) == [1]


def test_diverse_takes_the_farthest_from_all_chosen_and_never_what_is_wrong():
    tokens = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [9, 8, 7, 6, 5], [40, 41, 42, 43]]
    chosen = diverse(group(2.0, 1.0, 1.0, 0.0, tokens=tokens), SelectConfig(k=2))
    assert chosen == [0, 2]
    assert diverse(group(2.0, 1.0, 1.0, 0.0, tokens=tokens), SelectConfig(k=4)) == [0, 2, 1]


def test_diverse_is_max_min_and_not_max_sum():
    # Of the chosen pairs {0: 12 23, 1: 89 90}, completion 2 shares half with the first, 3 a quarter with each: its nearest is farther.
    tokens = [[1, 2, 3], [8, 9, 10], [1, 2, 50], [1, 2, 60, 8, 9, 61, 62]]
    config = SelectConfig(k=3)
    chosen = diverse(group(3.0, 2.0, 1.0, 1.0, tokens=tokens), config)
    assert chosen[0] == 0 and chosen[1] == 1
    assert chosen[2] == 3


def test_majority_votes_without_gold_and_failed_ones_have_no_vote():
    g = group(UNSCORED, UNSCORED, UNSCORED, FAILED, FAILED)
    answers = {g.id: ["7", "8", "7", "8", "8"]}
    assert sorted(kept([g], lambda g: answers[g.id], rule="majority", k=5)) == [0, 2]
    assert kept([g], lambda g: [None] * 5, rule="majority") == []


def test_majority_prefers_the_higher_reward_within_the_winning_answer():
    assert kept([group(0.1, 0.9, 0.5)], lambda g: ["a", "b", "a"], rule="majority") == [2]


def test_majority_without_answers_is_refused():
    with pytest.raises(ValueError, match="needs the answers"):
        select([group(1.0)], SelectConfig(rule="majority"))


def test_max_per_prompt_holds_over_all_groups_of_a_prompt():
    groups = [group(1.0, 1.0, prompt="p"), group(1.0, prompt="q"), group(1.0, 1.0, prompt="p", attempt=1)]
    chosen = select(groups, SelectConfig(max_per_prompt=3))
    assert [choice.group.prompt.id for choice in chosen].count("p") == 3 and len(chosen) == 4


def test_ties_follow_the_seed_and_nothing_else():
    g = group(1.0, 1.0, 1.0, 1.0)
    by_seed = [all_correct(g, SelectConfig(seed=seed)) for seed in range(50)]
    assert by_seed == [all_correct(g, SelectConfig(seed=seed)) for seed in range(50)]
    first = [ranked[0] for ranked in by_seed]
    assert {place: first.count(place) > 3 for place in range(4)} == {0: True, 1: True, 2: True, 3: True}


def test_pairs_set_the_best_against_the_worst_and_skip_ties_and_failures():
    g = group(0.0, 1.0, FAILED, 0.5)
    (pair,) = pairs([g], SelectConfig())
    assert (pair.chosen, pair.rejected, pair.margin) == (1, 0, 1.0)
    assert pairs([group(1.0, 1.0), group(FAILED, 1.0)], SelectConfig()) == []
    two = pairs([group(0.0, 1.0, 0.25, 0.75)], SelectConfig(), per_group=2)
    assert [(pair.chosen, pair.rejected) for pair in two] == [(1, 0), (3, 2)]
    assert len(pairs([group(0.0, 1.0, 0.25, 0.75)], SelectConfig(), per_group=2, min_margin=0.75)) == 1


def test_a_pair_is_trls_preference_row():
    g = group(0.0, 1.0)
    (pair,) = pairs([g], SelectConfig())
    assert preference_row(pair, ["bad", "good"]) == {"prompt": "p", "chosen": "good", "rejected": "bad"}
    chat = [{"role": "user", "content": "p"}]
    g = Group(g.id, Prompt("p", chat, "p", np.zeros(1, np.int32)), 0, g.completions, g.scores)
    assert preference_row(pairs([g], SelectConfig())[0], ["bad", "good"]) == {
        "prompt": chat,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }


def test_a_choice_names_its_completion():
    g = group(0.0, 1.0)
    assert Choice(g, 1).completion is g.completions[1]


@pytest.mark.parametrize("window", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(ValidationError, match="is no window"):
        SelectConfig(pass_rate=window)
