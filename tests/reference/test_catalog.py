"""The table of algorithms: what each row learns from and needs; settings are strict."""

from __future__ import annotations

import pytest
from torch import tensor
from torch.testing import assert_close

from dressage.algorithms.catalog import ALGORITHMS, algorithm
from dressage.algorithms.policy_gradient import PolicyGradientSettings
from dressage.batches import Experience, PreferenceBatch, SupervisedBatch, TokenScores
from dressage.errors import ConfigError


def test_rows_say_what_they_learn_from_and_need() -> None:
    batches = {name: set(row.losses) for name, row in ALGORITHMS.items()}
    assert batches["sft"] == {SupervisedBatch}
    assert batches["reward_log_sig"] == batches["reward_log_exp"] == {PreferenceBatch, SupervisedBatch}
    assert batches["ppo"] == {Experience, SupervisedBatch}
    assert algorithm("ppo").roles == {"reference", "value", "reward"}
    for row in ALGORITHMS.values():
        assert (row.advantage is None) == (Experience not in row.losses)
        assert row.advantage is None or row.teach is None


def test_demonstrations_cost_their_surprise_and_gamma_times_it_beside_ppo() -> None:
    scores = TokenScores(tensor([[0.0, -1.5, -0.5]]))
    mask = tensor([[False, True, True]])
    batch = SupervisedBatch(tokens=tensor([[1, 2, 3]]), attention_mask=~mask | mask, loss_mask=mask)
    sft, ppo = algorithm("sft"), algorithm("ppo").with_settings({"ptx_coef": 0.1})
    assert_close(sft.losses[SupervisedBatch](scores, batch, sft.settings), {"nll": tensor([[0.0, 1.5, 0.5]])})
    assert_close(ppo.losses[SupervisedBatch](scores, batch, ppo.settings), {"ptx": tensor([[0.0, 0.15, 0.05]])})
    plain = algorithm("ppo")
    assert plain.losses[SupervisedBatch](scores, batch, plain.settings)["ptx"].abs().sum() == 0


def test_both_reward_rows_have_one_loss() -> None:
    text = tensor([[1], [1], [1]])
    batch = PreferenceBatch(text, text > 0, text > 0, tensor([0, 0, 0]), tensor([4, 4, 4]), tensor([2, 0, 1]))
    rewards = tensor([300.0, -300.0, 0.5])
    rows = [algorithm(name) for name in ("reward_log_sig", "reward_log_exp")]
    log_sig, log_exp = (row.losses[PreferenceBatch](rewards, batch, row.settings)["pair"] for row in rows)
    assert_close(log_sig, log_exp)
    assert sorted(log_sig.tolist()) == pytest.approx([299.5, 300.5, 600.0])


def test_settings_can_be_changed_and_are_checked() -> None:
    changed = algorithm("ppo").with_settings({"clip_high": 0.28, "whiten_advantages": False})
    assert changed.settings == PolicyGradientSettings(clip_high=0.28, whiten_advantages=False)
    assert algorithm("ppo").settings == PolicyGradientSettings()
    with pytest.raises(ConfigError, match=r"settings\.clip_hihg.*clip_high"):
        algorithm("ppo").with_settings({"clip_hihg": 0.28})
    with pytest.raises(ConfigError, match=r"settings\.lam=2 must lie between 0 and 1"):
        algorithm("ppo").with_settings({"lam": 2})
    with pytest.raises(ConfigError, match=r"'pop'.*ppo"):
        algorithm("pop")
