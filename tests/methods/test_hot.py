"""HoT: which frames stay, its published settings, its losses."""

from __future__ import annotations

import pytest
import torch

from foveate.core import BackboneContext, Budget, EncoderContext, Tokens
from foveate.errors import AttachmentError
from foveate.methods.hot import HoT, choose_frames, pose_loss


def poses(*values: float) -> torch.Tensor:
    return torch.tensor(values)[None, :, None].expand(1, -1, 4).contiguous()


@pytest.mark.parametrize("seed", range(5))
def test_a_held_pose_gives_one_frame_before_another_is_taken(seed):
    """Needles: as many different poses as frames are kept, each held for a while."""
    draw = torch.Generator().manual_seed(seed)
    different = torch.randn(6, 8, generator=draw) * 3
    held = different.repeat_interleave(torch.randint(2, 6, (6,), generator=draw), 0)
    pose_F = (held[:, None] - different).norm(dim=-1).argmin(1)
    kept = choose_frames(held[None], 6)[0]
    assert sorted(pose_F[kept].tolist()) == list(range(6))


def test_kept_frames_ascend_and_all_can_stay():
    x = torch.randn(3, 20, 5)
    for keep in (1, 7, 20):
        kept = choose_frames(x, keep)
        assert kept.shape == (3, keep) and bool((kept.diff(dim=1) > 0).all())
    assert kept.tolist() == [list(range(20))] * 3


def test_the_centre_stays_whatever_its_score():
    x = poses(0, 0, 0, 0, 0, 5, 9, 14)
    assert 2 not in choose_frames(x, 3)[0].tolist()
    kept = choose_frames(x, 3, centre=2)[0].tolist()
    assert 2 in kept and len(kept) == 3


def test_ties_go_to_the_earlier_frame_unless_noise_decides():
    x = poses(1, 1, 1, 1)
    assert choose_frames(x, 2).tolist() == [[0, 1]]
    pairs, noise = poses(1, 1, 5, 5), torch.tensor([[0.1, 0.9, 0.1, 0.9]])
    assert choose_frames(pairs, 2).tolist() == [[0, 2]]
    assert choose_frames(pairs, 2, noise_BF=noise).tolist() == [[1, 3]]
    drawn = [
        choose_frames(pairs, 2, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (0, 0, 1, 2, 3, 4, 5)
    ]
    assert drawn[0] == drawn[1] and len({str(found) for found in drawn}) > 1
    with pytest.raises(ValueError, match="between 1 and 4 frames"):
        choose_frames(x, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "both"}, "variant must be"),
        ({"recovery": "none"}, "recovery must be"),
        ({"neighbours": 0}, "neighbours must be"),
        ({"layer": 0}, "layer must be above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HoT(**arguments)


def test_published_settings():
    assert HoT().cuts(8) == (3,) and HoT(layer=1).cuts(5) == (1,) and HoT(layer=7).cuts(8) == (7,)
    assert HoT().count_frames(243, Budget(retain=1 / 3)) == 81
    assert HoT().count_frames(243, Budget(tokens=61)) == 61
    assert HoT().count_frames(351, Budget(retain=1 / 3)) == 117
    with pytest.raises(ValueError, match="layer = 9"):
        HoT(layer=9).check(8, None)


def test_it_says_where_it_runs():
    tokens = Tokens(torch.zeros(1, 4, 2))
    context = EncoderContext(Budget(retain=0.5), method="hot")
    kept = HoT().encoder(tokens, context)
    assert kept is not None
    with pytest.raises(AttachmentError, match="backbone of its own"):
        HoT()._trained(context, 2)  # pyright: ignore[reportArgumentType]
    assert BackboneContext(Budget(retain=0.5)).signal("recovery") is None
    with pytest.raises(ValueError, match="Unknown signal"):
        BackboneContext(Budget(retain=0.5)).signal("nothing")


# -- losses ---------------------------------------------------------------------------------------


def test_the_loss_is_its_three_terms():
    draw = torch.Generator().manual_seed(0)
    found, true = torch.randn(2, 2, 6, 17, 3, generator=draw)
    weights = [1, 1, 2.5, 2.5, 1, 2.5, 2.5, 1, 1, 1, 1.5, 1.5, 4, 4, 1.5, 4, 4]
    error = rough = speed = 0.0
    for b in range(2):
        for j in range(17):
            for f in range(6):
                error += weights[j] * float((found[b, f, j] - true[b, f, j]).norm()) / 204
            for f in range(5):
                step = found[b, f + 1, j] - found[b, f, j]
                rough += weights[j] * float(step.square().sum()) / (170 * 3)
                speed += float((step - (true[b, f + 1, j] - true[b, f, j])).norm()) / 170
    expected = error + 0.5 * rough + 2 * speed
    assert pose_loss(found, true).item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_refuses_what_has_no_velocity():
    one = torch.zeros(1, 1, 17, 3)
    with pytest.raises(ValueError, match="two frames"):
        pose_loss(one, one)
    with pytest.raises(ValueError, match="one shape"):
        pose_loss(one, one[0])
    with pytest.raises(ValueError, match="17 joints and 3 weights"):
        pose_loss(one.expand(1, 2, 17, 3), one.expand(1, 2, 17, 3), joint_weights=[1, 1, 1])
