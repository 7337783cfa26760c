"""The settings in the `vit_mae` block of nnU-Net's plans, each checked where it is read.

No torch: commands and planner import this at no cost. Axes are z y x, as in the arrays that nnU-Net preprocesses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.presets import (
    AUGMENTATIONS,
    AXES,
    BLOCKS,
    COMPILING,
    DECODERS,
    ENCODER_SETTINGS,
    LOSSES,
    MODALITY_VECTORS,
    POSITION_UNITS,
    POSITIONS,
    PRETRAINING_DECODERS,
    SIZES,
    TOKENIZERS,
    UPSAMPLINGS,
)
from nnunet_vit_mae.sections import Section, refuse_unknown

BLOCK = "vit_mae"  # of a configuration in the plans

LEAST_TAPS = 3  # as many as UNETR has
MOST_TOKENS = 1024  # along an axis: far more than any memory holds
TOKEN_SIDES = (1, 2, 4, 8, 16, 32)  # convolutional decoders double their grid until it reaches the voxels

Triple = tuple[int, int, int]  # of axes z y x: the sides of a token, a grid of tokens, a factor of upsampling


def token_grid(patch_size: Sequence[int], token: Sequence[int]) -> tuple[int, ...]:
    """Return the number of tokens along z y x; the last one of an axis may reach beyond the patch."""
    return tuple(math.ceil(voxels / side) for voxels, side in zip(patch_size, token, strict=True))


def count_visible(tokens: int, mask_ratio: float) -> int:
    """Return how many tokens stay visible, at least one; truncated, a mask ratio of 0.9 would leave 99 of 1000."""
    return max(1, round(tokens * (1 - mask_ratio)))


@dataclass(frozen=True, kw_only=True)
class Network(Section):
    """The network. An encoder also fits other networks of the same size, token, positions and blocks.

    In plans, the default token depends on patch and spacing, and the default decoder is `unet` (adaptive: `unetr`).
    """

    section = "network"

    size: str = "S"
    token: tuple[int, int, int] = (8, 8, 8)
    decoder: str = "upscale"
    upsampling: str = "nearest"  # in the convolutional decoders, `unetr`, `sfpn` and `upscale`
    decoder_width: int = 0  # features at full resolution in the convolutional decoders; 0: they follow the encoder
    upscale_convolutions: int = 1  # of each stage of `upscale`: 1, as in ViTiac, or 2
    taps: tuple[int, ...] = ()  # of `unetr`: blocks counted from 1, ascending; none given: evenly spaced
    positions: str = "both"
    position_unit: str = "token"  # of the coordinates: in mm, thick slices and other spacings look alike
    rotary_base: float = 100.0  # the slowest rotary frequency is about 1 / base
    blocks: str = "vit"
    tokenizer: str = "linear"
    norm_eps: float = 1e-5  # of the encoder's layer norms; timm's ViTs have 1e-6
    learned_positions: tuple[int, ...] = ()  # grid (z y x) of a table in the encoder, in place of sine-cosine positions
    register_tokens: int = 0  # learned tokens without a place that take part in the encoder's attention
    adaptive: bool = False  # each contrast has a sequence of tokens of its own (AMAE), and is not a channel of one
    modality_vectors: str = "one_hot"  # of the adaptive tokenizer

    def __post_init__(self) -> None:
        self.require_one_of(size=SIZES, decoder=DECODERS, upsampling=UPSAMPLINGS, blocks=BLOCKS, positions=POSITIONS)
        self.require_one_of(position_unit=POSITION_UNITS, tokenizer=TOKENIZERS, modality_vectors=MODALITY_VECTORS)
        sides_fit = len(self.token) == 3 and all(side in TOKEN_SIDES for side in self.token)
        self.require("token", sides_fit, f"three of {', '.join(map(str, TOKEN_SIDES))} (z y x)")
        self.require_not_negative("decoder_width")
        self.require("upscale_convolutions", self.upscale_convolutions in (1, 2), "1 or 2")
        self.require_positive("rotary_base", "norm_eps")
        self.require("register_tokens", 0 <= self.register_tokens <= MOST_TOKENS, f"from 0 to {MOST_TOKENS}")
        grid = self.learned_positions
        grid_fits = len(grid) in (0, 3) and all(0 < tokens <= MOST_TOKENS for tokens in grid)
        expected = f"empty, or three numbers of tokens (z y x), none above {MOST_TOKENS}"
        self.require("learned_positions", grid_fits, expected)
        if self.adaptive:
            self.require("learned_positions", not grid, "empty, as adaptive is set")
            self.require("register_tokens", not self.register_tokens, "0, as adaptive is set")
            self.require("tokenizer", self.tokenizer == "linear", "linear, as adaptive is set")
            self.require("decoder", self.decoder != "unet", "another one, as adaptive is set")
        if self.taps:
            self._check_taps()

    def _check_taps(self) -> None:
        depth, skips, taps = SIZES[self.size].depth, self._skips, list(self.taps)
        fit = 0 < skips <= len(taps) and all(1 <= block <= depth for block in taps) and taps == sorted(taps)
        number = f"{skips} or more blocks from 1 to {depth}, ascending" if skips else "empty"
        self.require("taps", fit, f"{number}, with the decoder {self.decoder} and this token")

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """Return what belongs to the weights of an encoder beside size, token and channels, as in plans."""
        return {name: value for name, value in self.to_dict().items() if name in ENCODER_SETTINGS}

    def token_sequences(self, channels: int) -> int:
        """Return how many sequences of tokens a volume has at most: one, or one for each contrast."""
        return channels if self.adaptive else 1

    @property
    def _skips(self) -> int:
        """Return the skips that have hidden states: one for each doubling but the last, which joins the image."""
        return max(0, max(self.token).bit_length() - 2) if self.decoder == "unetr" else 0

    @property
    def tapped_blocks(self) -> tuple[int, ...]:
        """Return the blocks that the decoder builds on beside the last one.

        By default there are as many as skips, and three at least, evenly spaced. For token 16 and twelve blocks that
        gives 4, 7 and 10 as in UNETR's public code (its paper says 3, 6 and 9).
        """
        depth = SIZES[self.size].depth
        count = max(LEAST_TAPS, self._skips) if self._skips else 0
        return self.taps or tuple(1 + round(i * depth / (count + 1)) for i in range(1, count + 1))


@dataclass(frozen=True, kw_only=True)
class Pretraining(Section):
    """The masked autoencoding protocol (He et al. 2022, appendix A.1; mask ratio and epochs of ViTiac, section 2.2).

    Two numbers differ. The original's base rate of 1.5e-4 is meant for batches of 4096 and hardly moves the weights at
    batch 16 (see docs/explanation.md); the recipe `vitiac` has the original's. The original does not clip gradients.
    """

    section = "pretraining"

    epochs: int = 800  # each with as many samples as there are cases
    batch_size: int = 16
    crops_per_volume: int = 1  # cut from what is read at once, near one another
    masks_per_crop: int = 1
    mask_ratio: float = 0.9
    decoder: str = "self"
    decoder_heads: int = 0  # 0: those of the size; fewer and wider ones take less time
    rebuilt_share: float = 1.0  # of the masked tokens, drawn at random; the others never enter the decoder
    skip_background: bool = False  # tokens without content (air, zeros) are neither seen nor masked
    base_lr: float = 4.8e-3  # lr = base_lr * batch_size / 256, so 3e-4 at batch 16, for which it is meant
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the schedule: 40 of 800 epochs
    norm_pix: bool = True
    plain_share: float = 0.0  # of the epochs: the first ones, whose loss is plain, before norm-pix takes over
    gradient_clip: float = 1.0
    mirroring: str = "zyx"  # axes along which half of the crops are flipped, or none
    rotation: float = 0.0  # degrees: the largest angle about each axis, of a fifth of the crops
    scaling: tuple[float, float] = (1.0, 1.0)  # smallest and largest factor of sizes, of a fifth of the crops
    compile: str = "auto"  # forward pass and loss; auto: long runs on a GPU, if torch can
    seed: int = 0  # of weights, crops and masks

    def __post_init__(self) -> None:
        self.require_positive("epochs", "batch_size", "base_lr", "gradient_clip", "crops_per_volume", "masks_per_crop")
        self.require_not_negative("decoder_heads", "weight_decay", "seed")
        self.require_one_of(decoder=PRETRAINING_DECODERS, compile=COMPILING)
        self.require_share("warmup", "plain_share")
        expected = f"a multiple of {self.samples_per_read}, crops_per_volume x masks_per_crop"
        self.require("batch_size", self.batch_size % self.samples_per_read == 0, expected)
        self.require("mask_ratio", 0 < self.mask_ratio < 1, "between 0 and 1, both excluded")
        self.require("rebuilt_share", 0 < self.rebuilt_share <= 1, "a share above 0 and at most 1")
        self.require("plain_share", self.norm_pix or not self.plain_share, "0, as norm_pix is not set")
        self.require("mirroring", _names_axes(self.mirroring), "none, or axes such as zy")
        self.require("rotation", 0 <= self.rotation <= 180, "from 0 to 180 degrees")
        fit = len(self.scaling) == 2 and 0.1 <= self.scaling[0] <= self.scaling[1] <= 10
        self.require("scaling", fit, "two factors from 0.1 to 10, the smaller one first")

    @property
    def samples_per_read(self) -> int:
        """Return how many samples of a batch come from one read."""
        return self.crops_per_volume * self.masks_per_crop

    @property
    def reads(self) -> int:
        """Return how many volumes are read for a batch."""
        return self.batch_size // self.samples_per_read

    @property
    def plain_epochs(self) -> int:
        """Return in how many epochs, the first ones, the loss is plain although `norm_pix` is set; never in all."""
        return min(round(self.plain_share * self.epochs), self.epochs - 1)

    def norm_pix_in(self, epoch: int) -> bool:
        """Return whether the loss of an epoch, counted from 0, is norm-pix."""
        return self.norm_pix and epoch >= self.plain_epochs

    @property
    def lr(self) -> float:
        """Return the peak learning rate."""
        return self.base_lr * self.batch_size / 256

    def with_lr(self, lr: float) -> Pretraining:
        """Return the same protocol at another peak learning rate."""
        return dataclasses.replace(self, base_lr=lr * 256 / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Finetuning(Section):
    """How the segmenter learns.

    `nnUNetTrainerBaseline` has the same `epochs`, `iterations`, `mirroring` and `seed`; `nnUNetTrainerBaselineAdamW`
    has all that does not concern an encoder.
    """

    section = "finetuning"

    epochs: int = 1000
    iterations: int = 250  # per epoch
    batch_size: int = 4
    lr: float = 3e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    layer_decay: float = 0.75  # of the learning rate, per block from the head down; pre-trained encoders only
    freeze_epochs: int = 0  # in which only the decoder learns; pre-trained encoders only
    drop_path: float = 0.1
    contrast_dropout: float = 0.0  # probability of each contrast to be taken away, never the last one of a sample
    loss: str = "dice_ce"  # nnU-Net's sum of Dice and cross-entropy, or its Dice alone
    augmentation: str = "loader"  # nnU-Net's, in the workers of its loader, or on the `device` that trains
    mirroring: str = "auto"  # axes, or none, in prediction too; auto: all, but none where labels name sides
    foreground_prior: float = 0.02  # share of the voxels that the first step holds for foreground; 0: random biases
    gradient_clip: float = 1.0
    seed: int = -1  # of weights, sampling and augmentation; below 0: another one each time

    def __post_init__(self) -> None:
        self.require_positive("epochs", "iterations", "batch_size", "lr", "gradient_clip")
        self.require_not_negative("freeze_epochs", "weight_decay")
        self.require_one_of(loss=LOSSES, augmentation=AUGMENTATIONS)
        self.require_share("foreground_prior", "drop_path", "warmup")
        self.require("layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        fits = self.mirroring == "auto" or _names_axes(self.mirroring)
        self.require("mirroring", fits, "auto, none, or axes such as zy")
        self.require("contrast_dropout", 0 <= self.contrast_dropout < 1, "a probability from 0 up to, but not, 1")


@dataclass(frozen=True, kw_only=True)
class EncoderFile(Section):
    """A pre-trained encoder from elsewhere; without one, fine-tuning takes what was pre-trained with the same plans."""

    section = "encoder"

    file: str = ""
    sha256: str = ""  # of the file when the plans were written

    def __post_init__(self) -> None:
        self.require("sha256", bool(self.file) == bool(self.sha256), "given whenever encoder.file is")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The `vit_mae` block of a configuration in nnU-Net's plans."""

    network: Network = field(default_factory=Network)
    encoder: EncoderFile = field(default_factory=EncoderFile)
    pretraining: Pretraining = field(default_factory=Pretraining)
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        protocol, width = self.pretraining, SIZES[self.network.size].decoder_width
        expected = f"0 or a divisor of {width}, the width of the decoder of size {self.network.size}"
        protocol.require("decoder_heads", width % (protocol.decoder_heads or width) == 0, expected)
        fits = protocol.compile != "on" or not self.network.adaptive
        protocol.require("compile", fits, "auto or off, as network.adaptive is set")

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> Settings:
        """Read a block; what it leaves out takes the default.

        Raises `UserError` for an unknown key, a value of the wrong type or one out of range, each by name.
        """
        return cls().updated(block)

    def updated(self, block: Mapping[str, Any]) -> Settings:
        """Return these settings with the values of `block` in place of their own (same errors as `from_dict`)."""
        if not isinstance(block, Mapping):
            raise UserError(f"vit_mae in the plans must be an object of settings, but it is {block!r}.")
        sections = {section.name: getattr(self, section.name) for section in dataclasses.fields(self)}
        refuse_unknown(block, sections, BLOCK)
        changed = {name: sections[name].updated(values, f"{BLOCK}.{name}") for name, values in block.items()}
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, ready for plans."""
        return {section.name: getattr(self, section.name).to_dict() for section in dataclasses.fields(self)}


def _names_axes(mirroring: str) -> bool:
    return mirroring == "none" or (bool(mirroring) and set(mirroring) <= set(AXES))
