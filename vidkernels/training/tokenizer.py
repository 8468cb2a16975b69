# SPDX-License-Identifier: Apache-2.0
"""Training of the four tokenizers: one forward for all, their losses, a discriminator in turn, measures of reconstruction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vidkernels import ops
from vidkernels.errors import OptionError
from vidkernels.models.tokenizers._cnn_layers import Block
from vidkernels.models.tokenizers._vidtok_layers import FrameBlock, TimeBlock
from vidkernels.models.tokenizers.magvit import MAGVIT, MAGVITConfig
from vidkernels.models.tokenizers.magvit2 import MAGVIT2, MAGVIT2Config
from vidkernels.models.tokenizers.vidtok import VidTok
from vidkernels.models.tokenizers.vidtok_config import VidTokConfig
from vidkernels.models.tokenizers.vqgan import VQGAN, VQGANConfig
from vidkernels.nn import CodebookUsage
from vidkernels.nn.lfq import all_ranks
from vidkernels.ops._checks import check_option
from vidkernels.training import losses
from vidkernels.training.config import check_range, from_mapping
from vidkernels.training.discriminators import PatchGAN, StyleDiscriminator
from vidkernels.training.engine import StepContext, Task
from vidkernels.training.metrics import psnr, ssim
from vidkernels.training.parallel import bare
from vidkernels.training.perceptual import BACKBONES, LPIPS, LogitLoss, resnet50

MODELS: dict[str, tuple[type, type]] = {
    "magvit": (MAGVIT, MAGVITConfig),
    "magvit2": (MAGVIT2, MAGVIT2Config),
    "vqgan": (VQGAN, VQGANConfig),
}
DECODER = ("post_quant_conv", "decoder")  # what a stage with trained = "decoder" trains
TRAINED = ("all", "decoder")
DISCRIMINATORS = ("patch2d", "patch3d", "style", "style_blur")


def make_tokenizer(values: Mapping[str, Any]) -> nn.Module:
    """A fresh tokenizer of {"kind": "vidtok" | "magvit2" | "magvit" | "vqgan", settings of its configuration ...}.

    VidTok: "name" is a published configuration, which the other settings change.
    """
    settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    kind = settings.pop("kind", None)
    if kind == "vidtok":
        if "name" not in settings:
            raise OptionError("model.name", "a published VidTok configuration to start from", "none")
        named = VidTokConfig.named(str(settings.pop("name")))
        full = {**named.to_dict(), **settings}
        return VidTok(VidTokConfig.from_dict(full))
    check_option("model.kind", str(kind), ("vidtok", *MODELS))
    model, config = MODELS[str(kind)]
    return model(from_mapping(config, settings, "model"))


@dataclass(frozen=True)
class LossConfig:
    """Weights and kinds of the losses; 0 leaves one out.

    Attributes:
        reconstruction: "l1" or "l2". perceptual_weight, perceptual_net: LPIPS.
        logit_loss: weight of the squared distance of a ResNet-50's logits (MAGVIT: 0.1). logit_file: its weights; default:
            torchvision's IMAGENET1K_V1 in torch's hub cache.
        kl_weight, kl_reduction: of KL models. commitment_weight: of LFQ. codebook_weight: of learned codebooks.
        entropy_weight, entropy_gamma, entropy_temperature: weight (E H - gamma H E) at inverse temperature tau, of FSQ and LFQ.
        entropy_ramp: the weight starts at 3 times itself and falls to it over so many steps.
        discriminator: None, "patch2d", "patch3d", "style" or "style_blur". discriminator_channels: its base width.
        discriminator_layers: strided layers of a patch discriminator; frames need 3 * 2^layers pixels.
        adversarial, adversarial_weight, adversarial_start: form, weight, first step.
        adaptive: the weight is multiplied by the ratio of gradient norms at the decoder's last kernel.
        r1_weight, r1_every: every n-th step, n times as strong. lecam_weight: LeCam.
    """

    reconstruction: str = "l1"
    reconstruction_weight: float = 1.0
    perceptual_weight: float = 0.0
    perceptual_net: str = "vgg"
    logit_loss: float = 0.0
    logit_file: str | None = None
    kl_weight: float = 1e-6
    kl_reduction: str = "sample"
    commitment_weight: float = 0.25
    codebook_weight: float = 1.0
    entropy_weight: float = 0.0
    entropy_gamma: float = 1.0
    entropy_temperature: float = 100.0
    entropy_ramp: int = 0
    discriminator: str | None = None
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    adversarial: str = "hinge"
    adversarial_weight: float = 0.1
    adversarial_start: int = 0
    adaptive: bool = False
    r1_weight: float = 0.0
    r1_every: int = 1
    lecam_weight: float = 0.0

    def __post_init__(self) -> None:
        check_option("reconstruction", self.reconstruction, ("l1", "l2"))
        check_option("adversarial", self.adversarial, losses.ADVERSARIAL)
        check_option("kl_reduction", self.kl_reduction, ("sample", "element"))
        check_option("perceptual_net", self.perceptual_net, tuple(BACKBONES))
        if self.discriminator is not None:
            check_option("discriminator", self.discriminator, DISCRIMINATORS)
        for name in ("discriminator_channels", "discriminator_layers", "r1_every"):
            check_range(name, getattr(self, name), 1)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)):
                check_range(field.name, value, 0)
        if not self.entropy_temperature:
            raise OptionError("entropy_temperature", "a positive number", self.entropy_temperature)


class Outcome(NamedTuple):
    """Reconstruction like the video, int tokens or None, and the model's own loss terms."""

    reconstruction: Tensor
    indices: Tensor | None
    terms: dict[str, Tensor]


class TokenizerForward(nn.Module):
    """Encoding, quantization and decoding of any of the tokenizers in one `forward`, as DDP and FSDP2 need it.

    `stays`: parts of the tokenizer that are not trained.
    """

    def __init__(self, tokenizer: nn.Module, config: LossConfig, stays: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self.config, self._stays = config, tuple(stays)

    def train(self, mode: bool = True) -> TokenizerForward:
        """Parts that are not trained stay in eval mode: a codebook of moving averages would move."""
        super().train(mode)
        for part in self._stays:
            part.eval()
        return self

    @property
    def codebook_size(self) -> int | None:
        """Number of codes, None for a KL model."""
        config = self.tokenizer.config
        if isinstance(config, VidTokConfig):
            return math.prod(config.levels) if config.regularizer == "fsq" else None
        return 2**config.bits if isinstance(config, MAGVIT2Config) else config.codes

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last kernel."""
        layer: Any = self.tokenizer.decoder.conv_out
        return getattr(layer, "kernel", layer).weight

    def forward(self, video: Tensor) -> Outcome:
        """video [B, 3, T, H, W] in -1..1."""
        out = self._outcome(video)
        # FSDP2 warns of outputs that are views, which a cropped video is.
        return out._replace(reconstruction=out.reconstruction.clone()) if isinstance(self, FSDPModule) else out

    def _outcome(self, video: Tensor) -> Outcome:
        model = self.tokenizer
        if isinstance(model, VidTok):
            return self._vidtok(model, video)
        if isinstance(model, MAGVIT2):
            features = model.features(video)
            codes, indices = ops.lfq_quantize(features, dim=1, bit_order=model.config.bit_order)
            terms = {"commitment": losses.commitment_loss(features, codes)}
            if self.config.entropy_weight:
                tau = self.config.entropy_temperature
                pair = ops.lfq_entropy(features, dim=1, inv_temperature=tau, process_group=all_ranks())
                terms |= dict(zip(("sample_entropy", "batch_entropy"), pair, strict=True))
            return Outcome(model.decode(codes, num_frames=video.shape[2]), indices, terms)
        reconstruction, indices, loss = model(video)
        return Outcome(reconstruction, indices, {"codebook": loss})

    def _vidtok(self, model: VidTok, video: Tensor) -> Outcome:
        moments = model.moments(video)
        latents, log = model.regularize(moments)
        terms = {}
        if "kl_loss" in log:
            per_sample = moments[0].numel() // 2
            terms["kl"] = log["kl_loss"] / (per_sample if self.config.kl_reduction == "element" else 1)
        elif self.config.entropy_weight:
            tau = self.config.entropy_temperature
            options = {"dim": 1, "inv_temperature": tau, "process_group": all_ranks()}
            pair = ops.fsq_entropy(moments, model.config.levels, **options)
            terms |= dict(zip(("sample_entropy", "batch_entropy"), pair, strict=True))
        return Outcome(model.decode(latents, num_frames=video.shape[2]), log.get("indices"), terms)


class Judge(nn.Module):
    """A discriminator together with LeCam's averages; keys `net.*`, `lecam.averages`."""

    def __init__(self, config: LossConfig, size: tuple[int, int, int]) -> None:
        super().__init__()
        width = config.discriminator_channels
        # R1 is meant for a discriminator without norms, as MAGVIT's.
        norm = "none" if config.r1_weight else "group"
        self.net: nn.Module
        if config.discriminator in ("patch2d", "patch3d"):
            self.net = PatchGAN(
                2 if config.discriminator == "patch2d" else 3, width, config.discriminator_layers, norm=norm
            )
            self.net.check_size(size)
        else:
            self.net = StyleDiscriminator(size, width, blur=config.discriminator == "style_blur")
        self.lecam = losses.LeCam()

    def forward(self, video: Tensor, fake: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of a video; with `fake` also its logits and the LeCam penalty, whose averages take them in."""
        real = self._logits(video)
        if fake is None:
            return real, None, None
        logits = self._logits(fake)
        return real, logits, self.lecam(real, logits)

    def _logits(self, video: Tensor) -> Tensor:
        if not (video.is_cpu and torch.is_autocast_enabled("cpu")):
            return self.net(video)
        # In bfloat16 oneDNN's weight gradient of a 3-D convolution over 2 padded frames is what lay in memory (torch 2.13).
        with torch.autocast("cpu", enabled=False):
            return self.net(video.float())


class TokenizerTask(Task):
    """Reconstruction, the model's own terms and, if there is a discriminator, the adversarial game.

    Args:
        tokenizer: VidTok, MAGVIT2, MAGVIT or VQGAN. config: the losses.
        size: (frames, height, width) of the clips.
        validation: clips [1, 3, T, H, W] that `validate` measures on.
        trained: "all", or "decoder": encoder and quantizer stay as they are (VidTok's second stage).
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        config: LossConfig,
        size: tuple[int, int, int],
        validation: Iterable[Tensor] = (),
        trained: str = "all",
    ) -> None:
        check_option("trained", trained, TRAINED)
        stays = [child for name, child in tokenizer.named_children() if trained == "decoder" and name not in DECODER]
        for child in stays:
            child.requires_grad_(False)
        self.config, self.validation = config, list(validation)
        self.tokenizer = TokenizerForward(tokenizer, config, stays)
        self.modules: dict[str, nn.Module] = {"model": self.tokenizer}
        if config.discriminator is not None:
            self.modules["discriminator"] = Judge(config, size)
        self.perceptual = LPIPS(config.perceptual_net) if config.perceptual_weight else None
        self.logit_loss = LogitLoss(resnet50(config.logit_file)) if config.logit_loss else None

    def units(self, name: str) -> list[nn.Module] | None:
        """Residual blocks. The discriminator is small, and R1 differentiates it twice: it is replicated."""
        if name != "model":
            return None
        blocks = (FrameBlock, TimeBlock, Block)
        return [m for m in self.modules[name].modules() if isinstance(m, blocks)]

    def losses(
        self, name: str, modules: Mapping[str, nn.Module], batch: Any, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """See `Task.losses`."""
        if name == "model":
            return self._model(modules, batch, context)
        if context.step < self.config.adversarial_start:
            return None
        return self._discriminator(modules["discriminator"], batch, context)

    def _model(
        self, modules: Mapping[str, nn.Module], video: Tensor, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        if (
            config.adaptive and config.discriminator and isinstance(modules["model"], FSDPModule)
        ):  # before step 0, not at adversarial_start
            raise OptionError("adaptive", "false with fsdp", True, "Sharded weights are freed by its extra gradients.")
        out: Outcome = modules["model"](video)
        context.memo["reconstruction"] = out.reconstruction.detach()
        error = losses.reconstruction_loss(video, out.reconstruction, config.reconstruction)
        scalars = {"reconstruction": error, **out.terms}
        quality = config.reconstruction_weight * error
        if self.perceptual is not None:
            scalars["perceptual"] = self.perceptual.to(video.device)(video, out.reconstruction)
            quality = quality + config.perceptual_weight * scalars["perceptual"]
        if self.logit_loss is not None:
            scalars["logits"] = self.logit_loss.to(video.device)(video, out.reconstruction)
            quality = quality + config.logit_loss * scalars["logits"]
        weights = {
            "kl": config.kl_weight,
            "commitment": config.commitment_weight,
            "codebook": config.codebook_weight,
            "sample_entropy": config.entropy_weight * losses.ramp(context.step, config.entropy_ramp, 3.0),
        }
        weights["batch_entropy"] = -config.entropy_gamma * weights["sample_entropy"]
        total = quality + sum(weights[key] * term for key, term in out.terms.items())
        if config.discriminator is not None and context.step >= config.adversarial_start:
            logits, _, _ = bare(modules["discriminator"])(out.reconstruction)
            scalars["adversarial"] = losses.generator_loss(logits, config.adversarial)
            weight: Tensor | float = config.adversarial_weight
            if config.adaptive:
                scalars["adaptive_weight"] = losses.adaptive_weight(
                    quality, scalars["adversarial"], self.tokenizer.last_layer
                )
                weight = weight * scalars["adaptive_weight"]
            total = total + weight * scalars["adversarial"]
        return total, scalars

    def _discriminator(
        self, discriminator: nn.Module, video: Tensor, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        penalise = bool(config.r1_weight) and context.step % config.r1_every == 0
        video = video.detach().requires_grad_(penalise)
        real, fake, lecam = discriminator(video, context.memo["reconstruction"])
        total = losses.discriminator_loss(real, fake, config.adversarial)
        scalars = {"logit_real": real.mean(), "logit_fake": fake.mean()}
        if config.lecam_weight:
            scalars["lecam"] = lecam
            total = total + config.lecam_weight * lecam
        if penalise:
            scalars["r1"] = losses.r1_penalty(real, video)
            total = total + config.r1_weight * config.r1_every * scalars["r1"]
        return total, scalars

    def validate(self, modules: Mapping[str, nn.Module], context: StepContext) -> dict[str, float]:
        """Mean PSNR and SSIM of the validation clips; codes used, and the perplexity of their frequencies."""
        values: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        size = self.tokenizer.codebook_size
        usage = None if size is None else CodebookUsage(size).to(context.device)
        for clip in self.validation:
            video = clip.to(context.device)
            out: Outcome = modules["model"](video)
            values["psnr"].append(psnr(video, out.reconstruction).mean())
            values["ssim"].append(ssim(video, out.reconstruction).mean())
            if usage is not None and out.indices is not None:
                usage.update(out.indices)
        found = {f"validation_{key}": float(torch.stack(v).mean()) for key, v in values.items() if v}
        if usage is not None and usage.total:
            found |= {"codes_used": float(usage.used), "codebook_perplexity": usage.perplexity}
        return found


def loss_config(values: Mapping[str, Any]) -> LossConfig:
    """From parsed JSON; unknown keys are refused."""
    return from_mapping(LossConfig, values, "loss")
