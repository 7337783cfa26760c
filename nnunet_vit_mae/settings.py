"""The settings in the `vit_mae` block of nnU-Net's plans, each checked where it is read.

No torch: commands and planner import this at no cost. Axes are z y x, as in the arrays that nnU-Net preprocesses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
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

BLOCK = "vit_mae"  # of a configuration in the plans

LARGEST = 2**32 - 1  # of every number: the largest seed, and far more than any other setting can use
LEAST_TAPS = 3  # as many as UNETR has
MOST_TOKENS = 1024  # along an axis: far more than any memory holds
TOKEN_SIDES = (1, 2, 4, 8, 16, 32)  # convolutional decoders double their grid until it reaches the voxels

Triple = tuple[int, int, int]  # of axes z y x: the sides of a token, a grid of tokens, a factor of upsampling


def token_grid(patch_size: Sequence[int], token: Sequence[int]) -> tuple[int, ...]:
    """Return the number of tokens along z y x; the last one of an axis may reach beyond the patch."""
    return tuple(math.ceil(voxels / side) for voxels, side in zip(patch_size, token, strict=True))


def count_visible(tokens: int, mask_ratio: float) -> int:
    """Return how many tokens stay visible, at least one: rounded, for truncation would make 0.9 of 1000 leave 99."""
    return max(1, round(tokens * (1 - mask_ratio)))


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network. An encoder also fits other networks of the same size, token, positions and blocks.

    In plans, the default token depends on patch and spacing, and the default decoder is `unet` (adaptive: `unetr`).
    """

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
        _require_one_of(self, "network", size=SIZES, decoder=DECODERS, upsampling=UPSAMPLINGS, blocks=BLOCKS)
        _require_one_of(self, "network", positions=POSITIONS, position_unit=POSITION_UNITS)
        _require_one_of(self, "network", tokenizer=TOKENIZERS, modality_vectors=MODALITY_VECTORS)
        sides_fit = len(self.token) == 3 and all(side in TOKEN_SIDES for side in self.token)
        _require(sides_fit, "network.token", list(self.token), f"three of {', '.join(map(str, TOKEN_SIDES))} (z y x)")
        _require_not_negative(self, "network", "decoder_width")
        convolutions = self.upscale_convolutions
        _require(convolutions in (1, 2), "network.upscale_convolutions", convolutions, "1 or 2")
        _require_positive(self, "network", "rotary_base", "norm_eps")
        registers, grid = self.register_tokens, self.learned_positions
        _require(0 <= registers <= MOST_TOKENS, "network.register_tokens", registers, f"from 0 to {MOST_TOKENS}")
        grid_fits = len(grid) in (0, 3) and all(0 < tokens <= MOST_TOKENS for tokens in grid)
        expected = f"empty, or three numbers of tokens (z y x), none above {MOST_TOKENS}"
        _require(grid_fits, "network.learned_positions", list(grid), expected)
        if self.adaptive:
            _require(not grid, "network.learned_positions", list(grid), "empty, as adaptive is set")
            _require(not registers, "network.register_tokens", registers, "0, as adaptive is set")
            _require(self.tokenizer == "linear", "network.tokenizer", self.tokenizer, "linear, as adaptive is set")
            _require(self.decoder != "unet", "network.decoder", self.decoder, "another one, as adaptive is set")
        if self.taps:
            self._check_taps()

    def _check_taps(self) -> None:
        depth, skips, taps = SIZES[self.size].depth, self._skips, list(self.taps)
        fit = 0 < skips <= len(taps) and all(1 <= block <= depth for block in taps) and taps == sorted(taps)
        number = f"{skips} or more blocks from 1 to {depth}, ascending" if skips else "empty"
        _require(fit, "network.taps", taps, f"{number}, with the decoder {self.decoder} and this token")

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """Return what belongs to the weights of an encoder beside size, token and channels, as in plans."""
        return {name: value for name, value in to_json_types(self).items() if name in ENCODER_SETTINGS}

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
class Pretraining:
    """The masked autoencoding protocol (He et al. 2022, appendix A.1; mask ratio and epochs of ViTiac, section 2.2).

    Two numbers differ. The original's base rate of 1.5e-4 is meant for batches of 4096 and hardly moves the weights at
    batch 16 (see docs/explanation.md); the recipe `vitiac` has the original's. The original does not clip gradients.
    """

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
        _require_positive(self, "pretraining", "epochs", "batch_size", "base_lr", "gradient_clip")
        _require_positive(self, "pretraining", "crops_per_volume", "masks_per_crop")
        _require_not_negative(self, "pretraining", "decoder_heads", "weight_decay", "seed")
        _require_one_of(self, "pretraining", decoder=PRETRAINING_DECODERS, compile=COMPILING)
        _require_share(self, "pretraining", "warmup", "plain_share")
        expected = f"a multiple of {self.samples_per_read}, crops_per_volume x masks_per_crop"
        _require(self.batch_size % self.samples_per_read == 0, "pretraining.batch_size", self.batch_size, expected)
        _require(0 < self.mask_ratio < 1, "pretraining.mask_ratio", self.mask_ratio, "between 0 and 1, both excluded")
        share, plain = self.rebuilt_share, self.plain_share
        _require(0 < share <= 1, "pretraining.rebuilt_share", share, "a share above 0 and at most 1")
        _require(self.norm_pix or not plain, "pretraining.plain_share", plain, "0, as norm_pix is not set")
        _require(_names_axes(self.mirroring), "pretraining.mirroring", self.mirroring, "none, or axes such as zy")
        _require(0 <= self.rotation <= 180, "pretraining.rotation", self.rotation, "from 0 to 180 degrees")
        factors = list(self.scaling)
        fit = len(factors) == 2 and 0.1 <= factors[0] <= factors[1] <= 10
        _require(fit, "pretraining.scaling", factors, "two factors from 0.1 to 10, the smaller one first")

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
class Finetuning:
    """How the segmenter learns.

    `nnUNetTrainerBaseline` has the same `epochs`, `iterations`, `mirroring` and `seed`; `nnUNetTrainerBaselineAdamW`
    has all that does not concern an encoder.
    """

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
        _require_positive(self, "finetuning", "epochs", "iterations", "batch_size", "lr", "gradient_clip")
        _require_not_negative(self, "finetuning", "freeze_epochs", "weight_decay")
        _require_one_of(self, "finetuning", loss=LOSSES, augmentation=AUGMENTATIONS)
        _require_share(self, "finetuning", "foreground_prior", "drop_path", "warmup")
        _require(0 < self.layer_decay <= 1, "finetuning.layer_decay", self.layer_decay, "above 0 and at most 1")
        fits = self.mirroring == "auto" or _names_axes(self.mirroring)
        _require(fits, "finetuning.mirroring", self.mirroring, "auto, none, or axes such as zy")
        dropout = self.contrast_dropout
        _require(0 <= dropout < 1, "finetuning.contrast_dropout", dropout, "a probability from 0 up to, but not, 1")


@dataclass(frozen=True, kw_only=True)
class EncoderFile:
    """A pre-trained encoder from elsewhere; without one, fine-tuning takes what was pre-trained with the same plans."""

    file: str = ""
    sha256: str = ""  # of the file when the plans were written

    def __post_init__(self) -> None:
        _require(bool(self.file) == bool(self.sha256), "encoder.sha256", self.sha256, "given whenever encoder.file is")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The `vit_mae` block of a configuration in nnU-Net's plans."""

    network: Network = field(default_factory=Network)
    encoder: EncoderFile = field(default_factory=EncoderFile)
    pretraining: Pretraining = field(default_factory=Pretraining)
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        width, heads = SIZES[self.network.size].decoder_width, self.pretraining.decoder_heads
        expected = f"0 or a divisor of {width}, the width of the decoder of size {self.network.size}"
        _require(heads == 0 or width % heads == 0, "pretraining.decoder_heads", heads, expected)
        compiled = self.pretraining.compile
        fits = compiled != "on" or not self.network.adaptive
        _require(fits, "pretraining.compile", compiled, "auto or off, as network.adaptive is set")

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
        _refuse_unknown(block, sections, BLOCK)
        changed = {name: _updated_section(sections[name], values, name) for name, values in block.items()}
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, ready for plans."""
        return {section.name: to_json_types(getattr(self, section.name)) for section in dataclasses.fields(self)}


def to_json_types(section: Any) -> dict[str, Any]:
    """Return a section as JSON would give it back, which has lists where Python has tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(section).items()}


def _updated_section(section: Any, values: Any, name: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"vit_mae.{name} in the plans must be an object of settings, but it is {values!r}.")
    known = {setting.name: getattr(section, setting.name) for setting in dataclasses.fields(section)}
    _refuse_unknown(values, known, f"vit_mae.{name}")
    return dataclasses.replace(
        section, **{key: _typed(value, known[key], f"{name}.{key}") for key, value in values.items()}
    )


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(f"{where} in the plans has unknown keys: {', '.join(unknown)} (known: {', '.join(known)}).")


def _typed(value: Any, example: Any, name: str) -> Any:
    """Return `value` as the type of `example`; JSON has no tuples, and writes 1.0 as 1."""
    if isinstance(example, tuple) and isinstance(value, list | tuple):
        kinds = (int, float) if example and type(example[0]) is float else (int,)
        if all(type(entry) in kinds and abs(entry) <= LARGEST for entry in value):
            return tuple(map(kinds[-1], value))
    if type(example) is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    numbers = "numbers" if isinstance(example, tuple) and float in map(type, example) else "whole numbers"
    expected = f"a list of {numbers}" if isinstance(example, tuple) else f"of type {type(example).__name__}"
    _require(type(value) is type(example), name, value, expected)
    if isinstance(value, int | float):
        _require(abs(value) <= LARGEST, name, value, f"a number of at most {LARGEST:,}")
    return value


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}, but it must be {expected}.")


def _names_axes(mirroring: str) -> bool:
    return mirroring == "none" or (bool(mirroring) and set(mirroring) <= set(AXES))


def _require_one_of(section: Any, where: str, **known: Collection[str]) -> None:
    for name, choices in known.items():
        value = getattr(section, name)
        _require(value in choices, f"{where}.{name}", value, f"one of {', '.join(choices)}")


def _require_positive(section: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(0 < value < math.inf, f"{where}.{name}", value, "a number above 0")


def _require_not_negative(section: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value >= 0, f"{where}.{name}", value, "0 or more")


def _require_share(section: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(0 <= value < 1, f"{where}.{name}", value, "a share from 0 up to, but not, 1")
