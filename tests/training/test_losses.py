import pytest
import torch

from carvana.errors import UserError
from carvana.training.losses import LOSSES, loss_named


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_half_precision_logits_give_a_finite_float32_loss_and_gradient(name, half):
    logits = torch.tensor([[[6e4, -6e4], [6e4, 0.0]]], dtype=half, requires_grad=True)
    loss = loss_named(name)(logits, torch.tensor([[[0.0, 1.0], [1.0, 0.5]]]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_true_mask_costs_less_than_its_opposite(name):
    target = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    logits = 8 * target - 4
    loss = loss_named(name)
    assert loss(logits, target) < loss(-logits, target)


def test_binary_cross_entropy_of_a_zero_logit_is_log_two():
    assert loss_named("bce")(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)).item() == pytest.approx(0.693147, abs=1e-6)


def test_dice_loss_is_one_minus_dice():
    logits = torch.tensor([[[100.0, 100.0, -100.0]]])
    assert loss_named("dice")(logits, torch.tensor([[[0.0, 1.0, 1.0]]])).item() == pytest.approx(0.5, abs=1e-5)


def test_unknown_loss_names_the_nearest():
    with pytest.raises(UserError, match='"dise" is unknown, did you mean "dice"'):
        loss_named("dise")
