"""Losses and advantages by hand."""

import numpy as np
import pytest
import torch
from made import make_groups

from data.values import Completion, Group, Prompt, Score
from rl.advantage import advantage, group_advantage
from rl.batch import TrainBatch, items_of, pack
from rl.config import AdvantageConfig, LossConfig
from rl.loss import correction, kl_estimate, policy_loss, token_weight

EXACT = AdvantageConfig(eps=0.0)


def adv(rewards: list[float], config: AdvantageConfig = EXACT) -> list[float]:
    return advantage(torch.tensor([rewards], dtype=torch.float64), config)[0].tolist()


def test_group_scale_gives_unit_advantages() -> None:
    assert adv([1, 0, 0, 1]) == [1, -1, -1, 1]


def test_ddof_1_divides_by_the_sample_deviation() -> None:
    assert adv([1, 0, 0, 1], AdvantageConfig(eps=0.0, ddof=1)) == pytest.approx([0.75**0.5, -(0.75**0.5), -(0.75**0.5), 0.75**0.5])


def test_no_scale_is_dr_grpo() -> None:
    assert adv([1, 0, 0, 0], AdvantageConfig(scale="none")) == [0.75, -0.25, -0.25, -0.25]


def test_leave_one_out_compares_with_the_others() -> None:
    loo = AdvantageConfig(baseline="leave_one_out", scale="none")
    assert adv([1, 0, 0, 0.5], loo) == pytest.approx([1 - 0.5 / 3, -0.5, -0.5, 0.5 - 1 / 3])


def test_batch_scale_divides_by_one_deviation() -> None:
    rewards = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    std = float(np.std([1, 0, 3, 0]))
    got = advantage(rewards, AdvantageConfig(scale="batch", eps=0.0))
    assert got.tolist() == [[pytest.approx(0.5 / std), pytest.approx(-0.5 / std)], [pytest.approx(1.5 / std), pytest.approx(-1.5 / std)]]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9, -2.7])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing(value: float, scale: str) -> None:
    """Exactly nothing: the mean of seven equal floats can round to another float."""
    rewards = torch.tensor([[value] * 7, [0, 1, 0, 1, 0, 1, 0]], dtype=torch.float64)
    assert advantage(rewards, AdvantageConfig(scale=scale, eps=0.0))[0].abs().max() == 0


def test_a_failed_score_enters_no_mean() -> None:
    groups = make_groups([[1, None, 0, 1, 0]])
    assert group_advantage(groups, EXACT)[0].tolist() == [1, 0, -1, 1, -1]


def batch_of(lengths: list[int], advantages: list[float], masks: list[list[int]] | None = None) -> TrainBatch:
    masks = masks or [[1] * n for n in lengths]
    prompt = Prompt("p", "", "", np.array([3, 4, 5], np.int32))
    completions = tuple(
        Completion("p", "g", i, 0, 0, np.arange(10, 10 + n, dtype=np.int32), np.array(masks[i], np.uint8),
                   np.full(n, -1.0, np.float32), np.zeros(n, np.int32), "stop", "e")
        for i, n in enumerate(lengths)
    )  # fmt: skip
    group = Group("g", prompt, 0, completions, tuple(Score(float(i)) for i in range(len(lengths))))
    work, normaliser = items_of([group], torch.tensor([advantages], dtype=torch.float64), False, False)
    return pack(work, normaliser, temperature=1.0, max_tokens=10)


def test_a_flat_batch_by_hand() -> None:
    batch = batch_of([3, 1, 2], [1, -1, 0])
    # prompt 3 4 5 | 10 11 | (nothing) | 10: the last token of a completion predicts nothing
    assert batch.tokens_T.tolist() == [3, 4, 5, 10, 11, 10]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.segment_T.tolist() == [0, 0, 0, 1, 1, 3]
    assert batch.count_T.tolist() == [3, 3, 3, 1, 1, 1]
    assert batch.source_N.tolist() == [2, 3, 4, 2, 2, 5]
    assert batch.target_N.tolist() == [10, 11, 12, 10, 10, 11]
    assert batch.completion_N.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.length_B.tolist() == [3, 1, 2]
    assert (batch.normaliser.completions, batch.normaliser.tokens) == (3, 6)


def test_tokens_of_other_turns_are_forwarded_and_predict_but_are_not_predicted() -> None:
    batch = batch_of([4, 2], [1, -1], masks=[[1, 0, 0, 1], [1, 1]])
    # prompt 3 4 5 | 10 11 12 | 10: the last token of a completion predicts nothing, whoever wrote it
    assert batch.tokens_T.tolist() == [3, 4, 5, 10, 11, 12, 10]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 5, 3]
    assert batch.target_N.tolist() == [10, 13, 10, 11]
    assert batch.source_N.tolist() == [2, 5, 2, 6], "the policy's next word is predicted from the other's last token"
    assert batch.completion_N.tolist() == [0, 0, 1, 1]
    assert batch.length_B.tolist() == [2, 2]
    assert batch.normaliser.tokens == 4
    assert len(batch.engine_logp_N) == len(batch.version_N) == 4


def test_token_weights_by_hand() -> None:
    batch = batch_of([3, 1], [1, -1])
    assert token_weight(batch, "grpo").tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])
    assert token_weight(batch, "dapo").tolist() == pytest.approx([1 / 4] * 4)
    assert token_weight(batch, "dr_grpo").tolist() == pytest.approx([1 / 20] * 4)


def test_the_clip_cuts_gains_and_not_losses() -> None:
    batch = batch_of([4], [1.0])
    old = torch.zeros(4, dtype=torch.float64)
    logp = torch.tensor([0.5, 1.1, 1.5, 1.0], dtype=torch.float64).log().requires_grad_()
    parts = policy_loss(batch, logp, old, LossConfig(kind="dapo", correction="none"))
    assert parts.loss.item() == pytest.approx(-(0.5 + 1.1 + 1.28 + 1.0) / 4)
    parts.loss.backward()
    assert logp.grad.tolist() == pytest.approx([-0.125, -0.275, 0.0, -0.25])
    assert parts.clipped_high_N.tolist() == [False, False, True, False]


def test_gspo_has_one_ratio_a_completion() -> None:
    batch = batch_of([2], [1.0])
    logp = torch.tensor([0.2, -0.1], dtype=torch.float64)
    parts = policy_loss(batch, logp, torch.zeros(2, dtype=torch.float64), LossConfig(kind="gspo", correction="none"))
    assert parts.ratio_N.tolist() == pytest.approx([np.exp(0.05)] * 2)


def test_kl_estimates_by_hand() -> None:
    logp, ref = torch.tensor([0.0]), torch.tensor([0.5])
    assert [kl_estimate(logp, ref, k).item() for k in ("k1", "k2", "k3")] == pytest.approx([-0.5, 0.125, np.exp(0.5) - 1.5])


def test_corrections_by_hand() -> None:
    batch = batch_of([2, 1], [1.0, -1.0])  # engine_logp is -1 everywhere
    old = torch.tensor([-1.0 + np.log(3.0), -1.0 - np.log(4.0), -1.0 + np.log(1.5)])
    token = correction(batch, old, LossConfig(correction="token"))
    assert token.tolist() == pytest.approx([2.0, 0.25, 1.5])
    sequence = correction(batch, old, LossConfig(correction="sequence"))
    assert sequence.tolist() == pytest.approx([0.75, 0.75, 1.5])
    tight = correction(batch, old, LossConfig(correction="sequence", correction_max=1.2))
    assert tight.tolist() == [0.0, 0.0, 0.0]
    geometric = correction(batch, old, LossConfig(correction="geometric", correction_max=1.2))
    assert geometric.tolist() == pytest.approx([1.2, 0.25, 0.0])


def test_ratio_base_engine_needs_no_correction() -> None:
    batch = batch_of([2], [1.0])
    logp = torch.tensor([-0.9, -1.2])
    parts = policy_loss(batch, logp, None, LossConfig(ratio_base="engine"))
    assert parts.ratio_N.tolist() == pytest.approx(np.exp([0.1, -0.2]).tolist())
    assert parts.correction_N.tolist() == [1.0, 1.0]
