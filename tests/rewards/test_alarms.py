"""Alarms: they begin with the drift, speak once, end with it, and go on after a resume; and self_consistency, which needs them."""

import json

import numpy as np
import pytest

from data.values import Completion, Group, Prompt, Score
from rewards.alarms import WINDOW, Alarms
from rewards.self_consistency import self_consistency


def groups(rewards: list[float], shadow: float = 0.5, tokens: int = 10, form: float = 1.0, prompts: int = 4, answer: str | None = None):
    made = []
    for p in range(prompts):
        prompt = Prompt(f"p{p}", "q", "q", np.zeros(1, np.int32))
        completions, scores = [], []
        for i, reward in enumerate(rewards):
            one = np.ones(tokens, np.int32)
            text = answer if answer is not None else f"#### {p * 10 + i}"
            completions.append(Completion(prompt.id, f"g{p}", i, 0, 0, one, one, one * 0.0, one * 0, "stop", text))
            scores.append(Score(reward, "ok", {"math_answer": reward, "shadow": shadow + 0.1 * (i % 2), "think_format": form}))
        made.append(Group(f"g{p}", prompt, 0, tuple(completions), tuple(scores)))
    return made


def text(completion: Completion) -> str:
    return completion.engine  # where the test keeps it


STEADY = [0.0, 1.0, 0.0, 0.0]
BETTER = [1.0, 1.0, 1.0, 0.0]


def run(alarms: Alarms, steps: list) -> list[str]:
    return [message for step in steps for message in alarms.step(step, text).messages]


def test_nothing_is_said_of_steady_steps_and_of_a_reward_that_rises_with_its_shadow():
    alarms = Alarms(["shadow"])
    steps = [groups(STEADY)] * WINDOW + [groups(BETTER, shadow=0.9)] * (2 * WINDOW)
    assert run(alarms, steps) == []
    assert set(alarms.step(groups(STEADY), text).metrics) == {
        "alarm/shadow_gap/shadow", "alarm/shadow/shadow", "alarm/length_ratio", "alarm/length", "alarm/format_drop/think_format",
        "alarm/format/think_format", "alarm/same_answer", "alarm/answer",
    }  # fmt: skip


def test_a_reward_that_rises_while_its_shadow_falls_rings_once():
    alarms = Alarms(["shadow"])
    said = run(alarms, [groups(STEADY)] * WINDOW + [groups(BETTER, shadow=0.2)] * (2 * WINDOW))
    assert len(said) == 1
    assert said[0].startswith("alarm: the reward has risen by ") and "the shadow shadow has fallen by" in said[0]
    # reward: from 1/4 to 3/4 at a standard deviation of 0.433; shadow: by -0.3 at one of 0.05
    report = alarms.step(groups(BETTER, shadow=0.2), text)
    assert report.metrics["alarm/shadow_gap/shadow"] == pytest.approx(0.5 / 0.4330 + 0.3 / 0.05, rel=1e-3)
    assert report.metrics["alarm/shadow/shadow"] == 1.0
    assert run(alarms, [groups(STEADY)] * WINDOW) == []
    assert len(run(alarms, [groups(BETTER, shadow=0.2)] * WINDOW)) == 1  # it had ended


def test_length_format_and_one_answer_for_all_ring():
    start = [groups(STEADY)] * WINDOW
    longer = run(Alarms([]), start + [groups(STEADY, tokens=25)] * WINDOW)
    assert len(longer) == 1 and "times the 10 of the start" in longer[0]
    shorter = run(Alarms([]), start + [groups(STEADY, tokens=2)] * WINDOW)
    assert len(shorter) == 1
    broken = run(Alarms([]), start + [groups(STEADY, form=0.5)] * WINDOW)
    assert len(broken) == 1 and "think_format is 0." in broken[0] and "and was 1.00" in broken[0]
    same = run(Alarms([]), [groups(STEADY, answer="#### 42")])
    assert same == ["alarm: 16 of 16 answers of this step are '42'; look at the completions before you trust the curve"]
    assert run(Alarms([]), [groups(STEADY, answer="#### 42", prompts=3)]) == []


def test_a_resumed_run_says_what_one_that_was_never_stopped_says():
    steps = [groups(STEADY)] * WINDOW + [groups(BETTER, shadow=0.2, tokens=30)] * WINDOW
    whole = Alarms(["shadow"])
    expected = [whole.step(step, text) for step in steps]
    for cut in (2, WINDOW, WINDOW + 2):
        first = Alarms(["shadow"])
        got = [first.step(step, text) for step in steps[:cut]]
        second = Alarms(["shadow"], json.loads(json.dumps(first.state())))
        assert got + [second.step(step, text) for step in steps[cut:]] == expected


@pytest.mark.parametrize(
    ("answers", "rewards"),
    [
        (["4", "4", "5"], [1.0, 1.0, 0.0]),
        (["4", "4.0", r"\frac{8}{2}", "5", "5"], [1.0, 1.0, 1.0, 0.0, 0.0]),
        (["4", "5"], [None, None]),
        (["4", "4", "5", "5"], [None] * 4),
        (["4", "4", None], [1.0, 1.0, 0.0]),
        ([None, None], [None, None]),
        (["4", None], [None, 0.0]),
    ],
)
def test_self_consistency_is_for_a_single_majority(answers, rewards):
    completions = ["I do not know" if answer is None else rf"\boxed{{{answer}}}" for answer in answers]
    assert self_consistency(["q"] * len(answers), completions, ["g"] * len(answers)) == rewards
