# SPDX-License-Identifier: Apache-2.0
"""Losses and discriminators of tokenizer training against their formulas in float64; penalties against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import EPS
from torch import Tensor, nn

from vidkernels.errors import OptionError, ShapeError
from vidkernels.training import losses, psnr, ssim
from vidkernels.training.discriminators import PatchGAN, StyleDiscriminator, _Halve

# ImageNet's colours
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def naive(values: Tensor, function) -> Tensor:
    """Mean of a scalar function over all elements, one by one in float64."""
    return torch.tensor([function(v) for v in values.double().flatten().tolist()], dtype=torch.float64).mean()


def relu(v: float) -> float:
    return max(v, 0.0)


def softplus(v: float) -> float:
    return math.log1p(math.exp(-abs(v))) + relu(v)


ELEMENTWISE = {
    "l1": (lambda a, b: losses.reconstruction_loss(a, b, "l1"), lambda a, b: naive(a - b, abs)),
    "l2": (lambda a, b: losses.reconstruction_loss(a, b, "l2"), lambda a, b: naive(a - b, lambda v: v * v)),
    "commitment": (losses.commitment_loss, lambda a, b: naive(a - b, lambda v: v * v)),
    "generator hinge": (lambda a, b: losses.generator_loss(a, "hinge"), lambda a, b: -naive(a, float)),
    "generator nonsaturating": (
        lambda a, b: losses.generator_loss(a, "nonsaturating"),
        lambda a, b: naive(a, lambda v: softplus(-v)),
    ),
    "discriminator hinge": (
        lambda a, b: losses.discriminator_loss(a, b, "hinge"),
        lambda a, b: naive(a, lambda v: relu(1 - v)) + naive(b, lambda v: relu(1 + v)),
    ),
    "discriminator nonsaturating": (
        lambda a, b: losses.discriminator_loss(a, b, "nonsaturating"),
        lambda a, b: naive(a, lambda v: softplus(-v)) + naive(b, softplus),
    ),
    "kl per element": (
        lambda a, b: losses.kl_loss(a, b, "element"),
        lambda a, b: naive(a, lambda v: 0.5 * v * v) + naive(b, lambda v: 0.5 * (math.exp(v) - 1 - v)),
    ),
    "kl per sample": (
        losses.kl_loss,
        lambda a, b: (naive(a, lambda v: 0.5 * v * v) + naive(b, lambda v: 0.5 * (math.exp(v) - 1 - v))) * a[0].numel(),
    ),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_is_its_formula(name: str, dtype: torch.dtype) -> None:
    ours, formula = ELEMENTWISE[name]
    a, b = (torch.randn(3, 2, 5, 7, dtype=torch.float64).to(dtype) for _ in range(2))
    truth = formula(a.double(), b.double())
    value = ours(a, b)
    # Half precision is computed in float32. A sum of n terms, each rounded, is off by at most n roundings of its size.
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = a.numel() * EPS[value.dtype] * max(1.0, abs(float(truth)))
    assert abs(float(value.double() - truth)) <= bound


def test_gradients_go_where_they_should() -> None:
    a, b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses.commitment_loss(a, b).backward()
    torch.testing.assert_close(a.grad, 2 * (a - b).detach() / 6)
    assert b.grad is None
    for kind in losses.ADVERSARIAL:
        assert torch.autograd.gradcheck(lambda x, kind=kind: losses.generator_loss(x, kind), (a,))
        assert torch.autograd.gradcheck(lambda x, y, kind=kind: losses.discriminator_loss(x, y, kind), (a, b))
    assert torch.autograd.gradcheck(losses.kl_loss, (a, b))


def test_r1_is_half_the_squared_gradient_norm_and_differentiable() -> None:
    weight = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    video = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([(weight[k] * video.square()).sum((1, 2, 3)) for k in range(2)], 1)
    penalty = losses.r1_penalty(logits, video)
    gradient = 2 * weight.detach().mean(0) * video.detach()
    torch.testing.assert_close(penalty.detach(), 0.5 * gradient.square().sum((1, 2, 3)).mean())
    (found,) = torch.autograd.grad(penalty, weight)
    expected = (4 * weight.detach().mean(0) * video.detach().square()).mean(0) / 2
    torch.testing.assert_close(found, expected.expand_as(found))
    with pytest.raises(OptionError, match="video: expected a tensor that requires a gradient"):
        losses.r1_penalty(logits, video.detach())


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    y = x @ weight.T
    reconstruction, adversarial = y.square().mean(), -y.mean()
    ratio = losses.adaptive_weight(reconstruction, adversarial, weight)
    of_reconstruction = 2 * y.detach().T @ x / 20
    of_adversarial = -x.mean(0).expand(4, 3) / 4
    torch.testing.assert_close(ratio, of_reconstruction.norm() / (of_adversarial.norm() + 1e-4))
    assert not ratio.requires_grad
    assert losses.adaptive_weight(reconstruction, adversarial * 1e-12, weight, largest=7.0) == 7.0


def test_lecam_penalty_and_its_averages() -> None:
    lecam = losses.LeCam(decay=0.75).double()
    average = [0.0, 0.0]
    for _ in range(4):
        real, fake = torch.randn(6, dtype=torch.float64) + 1, torch.randn(6, dtype=torch.float64)
        expected = naive(real - average[1], lambda v: relu(v) ** 2) + naive(average[0] - fake, lambda v: relu(v) ** 2)
        torch.testing.assert_close(lecam(real, fake), expected)
        average = [0.75 * a + 0.25 * float(v.mean()) for a, v in zip(average, (real, fake), strict=True)]
    assert lecam.averages.tolist() == pytest.approx(average)
    before = lecam.averages.clone()
    lecam(real, fake * float("nan"))  # a step that is skipped
    assert float(lecam.averages[1]) == float(before[1]) and lecam.averages.isfinite().all()
    before = lecam.averages.clone()
    lecam.eval()(real, fake)
    assert torch.equal(lecam.averages, before)


def test_ramp_falls_to_one() -> None:
    assert [losses.ramp(s, 2000, 3.0) for s in (0, 1000, 2000, 5000)] == [3.0, 2.0, 1.0, 1.0]
    assert losses.ramp(0, 0, 3.0) == 1.0


@pytest.mark.parametrize("frames", [1, 4, 5])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda t: PatchGAN(2, 8), (1, None, 6, 6)),
        (lambda t: PatchGAN(3, 8, norm="none"), (1, None, 6, 6)),
        (lambda t: StyleDiscriminator((t, 64, 64), 4, (2, 4, 4, 4, 4)), ()),
        (lambda t: StyleDiscriminator((t, 64, 64), 4, (2, 4, 4, 4, 4), blur=True), ()),
    ],
    ids=["patch2d", "patch3d", "style", "style_blur"],
)
def test_discriminators_take_clips_of_any_length(make, shape, frames: int) -> None:
    model = make(frames)
    video = torch.randn(2, 3, frames, 64, 64, requires_grad=True)
    logits = model(video)
    assert logits.shape[0] == 2 and logits.shape[1] == 1 and logits.ndim == (5 if shape else 2)
    if shape:
        time = frames if model.dims == 2 else math.ceil(math.ceil(frames / 2) / 2)
        assert logits.shape[2:] == (time, 6, 6)
    losses.r1_penalty(logits, video).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_2d_patch_discriminator_judges_each_frame_alone() -> None:
    model = PatchGAN(2, 8, norm="none").eval()
    video = torch.randn(1, 3, 3, 32, 32)
    changed = video.clone()
    changed[:, :, 1] += 1
    same = (model(video) == model(changed)).all(dim=(0, 1, 3, 4))
    assert same.tolist() == [True, False, True]
    with pytest.raises(ShapeError, match="video: expected clips of"):
        StyleDiscriminator((4, 16, 16), 4, (2,))(video)
    with pytest.raises(ShapeError, match="video: expected height and width of at least 24"):
        model(video[..., :16, :16])
    with pytest.raises(OptionError, match="norm: expected one of"):
        PatchGAN(2, norm="layer")


@pytest.mark.parametrize("blur", [False, True])
def test_halving_keeps_constants_and_rounds_up(blur: bool) -> None:
    x = torch.full((1, 2, 5, 7, 1), 3.0)
    assert torch.allclose(_Halve(blur)(x), torch.full((1, 2, 3, 4, 1), 3.0))
    line = torch.arange(6.0).view(1, 1, 1, 1, 6)
    expected = [0.25, 2.0, 4.0] if blur else [0.5, 2.5, 4.5]
    assert _Halve(blur)(line).flatten().tolist() == pytest.approx(expected)


def test_psnr_and_ssim_against_their_formulas() -> None:
    x = torch.rand(2, 3, 4, 24, 20) * 2 - 1
    y = (x + 0.1 * torch.randn_like(x)).clamp(-1.2, 1.2)
    error = (x.double() - y.double().clamp(-1, 1)).square()
    expected = torch.stack([(10 * torch.log10(4 / error[b].mean((0, 2, 3)))).mean() for b in range(2)])
    torch.testing.assert_close(psnr(x, y).double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(psnr(x, x), torch.full((2,), 100.0)) and torch.allclose(ssim(x, x), torch.ones(2))
    window = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / 4.5)
    window = torch.outer(window, window) / window.sum() ** 2
    total, count = 0.0, 0
    a, b = x[0, 1, 2].double(), y[0, 1, 2].double().clamp(-1, 1)
    for i in range(14):
        for j in range(10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            c1, c2 = 0.02**2, 0.06**2
            total += float((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
            count += 1
    single = ssim(x[:1, 1:2, 2:3], y[:1, 1:2, 2:3])
    assert float(single) == pytest.approx(total / count, rel=1e-6)
    with pytest.raises(ShapeError, match="reconstruction: expected the video's shape"):
        psnr(x, y[:, :, :2])


def test_perceptual_loss_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    import sys

    from vidkernels.training.perceptual import LPIPS

    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(OptionError, match="perceptual_weight: expected 0 without the lpips package"):
        LPIPS()
    monkeypatch.setitem(sys.modules, "lpips", nn)
    with pytest.raises(OptionError, match="perceptual weights: expected the backbone's file, got none at"):
        LPIPS(weights=tmp_path / "vgg.pth")


def test_perceptual_loss_with_given_backbone_weights(tmp_path) -> None:
    lpips = pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    from vidkernels.training.perceptual import LPIPS

    backbone = torchvision.models.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "alexnet.pth")
    ours = LPIPS("alex", tmp_path / "alexnet.pth")
    video = torch.rand(1, 3, 2, 64, 64) * 2 - 1
    other = (video + 0.2 * torch.randn_like(video)).requires_grad_()
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    theirs.net.load_state_dict(ours.distance.net.state_dict())
    expected = torch.stack([theirs(video[:, :, t], other[:, :, t]).mean() for t in range(2)]).mean()
    torch.testing.assert_close(ours(video, other), expected)
    assert torch.equal(ours.distance.net.slice1[0].weight, backbone.features[0].weight)
    ours.train()(video, other).backward()
    assert other.grad.any() and not any(p.requires_grad for p in ours.parameters())
    assert float(ours(video, video)) == 0 and not ours.distance.training


class Pooled(nn.Module):
    """A classifier small enough to be written out: the mean colour of each half of a frame, through a layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.norm.running_mean.normal_()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape))
        halves = torch.cat([x[..., :112].mean((2, 3)), x[..., 112:].mean((2, 3))], 1)
        return self.drop(self.norm(self.layer(halves)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_loss_is_its_formula_on_normalized_frames(dtype: torch.dtype) -> None:
    from vidkernels.training.perceptual import LogitLoss

    network = Pooled()
    loss = LogitLoss(network).train()
    x, y = (torch.rand(2, 3, 3, 28, 16).to(dtype) * 2 - 1 for _ in range(2))
    y.requires_grad_()

    def logits(video: Tensor) -> Tensor:
        """Each frame alone, in float64."""
        out = []
        for frame in video.double().detach().transpose(1, 2).flatten(0, 1):
            wide = torch.nn.functional.interpolate(frame[None] / 2 + 0.5, (224, 224), mode="bilinear")[0]
            wide = torch.stack([(wide[c] - m) / s for c, m, s in zip(range(3), MEAN, STD, strict=True)])
            pooled = torch.cat([wide[..., :112].mean((1, 2)), wide[..., 112:].mean((1, 2))])
            row = network.layer.weight.double() @ pooled + network.layer.bias.double()
            out.append((row - network.norm.running_mean) / (network.norm.running_var + 1e-5).sqrt())
        return torch.stack(out)

    expected = (logits(x) - logits(y)).square().mean()
    value = loss(x, y)
    assert value.dtype == torch.float32 and network.sizes == [(6, 3, 224, 224)] * 2
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    value.backward()
    assert y.grad is not None and y.grad.abs().sum() > 0 and x.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in loss.parameters())
    assert not network.training and float(loss(x, x)) == 0
    assert network.norm.num_batches_tracked == 0
    with pytest.raises(ShapeError, match="reconstruction: expected the video's shape"):
        loss(x, y[:, :, :1])
    with pytest.raises(ShapeError, match="video: expected size 3 at axis 1"):
        loss(x[:, :1], y)


def test_logit_gradient_agrees_with_finite_differences() -> None:
    from vidkernels.training.perceptual import LogitLoss

    loss = LogitLoss(Pooled().double()).double()
    x, y = (torch.rand(1, 3, 1, 5, 4, dtype=torch.float64) * 2 - 1 for _ in range(2))
    assert torch.autograd.gradcheck(lambda v: loss(x, v), y.requires_grad_())


def test_logit_loss_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    import sys
    import types

    from vidkernels.training.perceptual import resnet50

    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(OptionError, match="logit_loss: expected 0 without torchvision"):
        resnet50()
    fake = types.ModuleType("torchvision.models")
    fake.resnet50 = lambda weights: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OptionError, match="expected the backbone's file, got none at .*resnet50-0676ba61.pth"):
        resnet50()
    (tmp_path / "checkpoints").mkdir()
    state = fake.resnet50(weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if "tracked" not in k}, tmp_path / "checkpoints/resnet50-0676ba61.pth")
    loaded = resnet50().state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    torch.save({**state, "0.weight": torch.zeros(4, 2)}, tmp_path / "other.pth")
    with pytest.raises(ShapeError, match=r"keys of torchvision's resnet50.*0.weight is \(4, 2\) instead of \(3, 2\)"):
        resnet50(tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(OptionError, match="path: expected a file of tensors"):
        resnet50(tmp_path / "broken.pth")


def test_logit_loss_through_torchvisions_network(tmp_path) -> None:
    torchvision = pytest.importorskip("torchvision")
    from vidkernels.training.perceptual import LogitLoss, resnet50

    plain = torchvision.models.resnet50(weights=None)
    torch.save(plain.state_dict(), tmp_path / "resnet50.pth")
    loss = LogitLoss(resnet50(tmp_path / "resnet50.pth"))
    assert torch.equal(loss.network.conv1.weight, plain.conv1.weight)
    x = torch.rand(1, 3, 2, 32, 40) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    prepared = [
        torchvision.transforms.functional.resize(v[0].detach().transpose(0, 1) / 2 + 0.5, [224, 224]) for v in (x, y)
    ]
    normalize = torchvision.transforms.Normalize(MEAN, STD)
    with torch.no_grad():
        a, b = (plain.eval()(normalize(v)) for v in prepared)
    value = loss(x, y)
    torch.testing.assert_close(value, (a - b).square().mean(), rtol=1e-4, atol=0)
    value.backward()
    assert y.grad.any() and not any(p.requires_grad for p in loss.parameters())
