"""Everything that can be chosen, as data: sizes, decoders, blocks. A variant is a row or value here, never a class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Widths, depths and attention heads of the encoder and of the pre-training decoder."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int


SIZES = {
    "XS": Size(96, 4, 6, 48, 2, 3),  # not from a paper: for demonstrations and tests on a CPU
    "S": Size(240, 12, 12, 120, 8, 12),  # ViTiac, supplementary table 1
    "M": Size(480, 12, 12, 240, 8, 12),
    "B": Size(768, 12, 12, 512, 8, 16),  # AMAE's ViT-B; it names no decoder, this is the original MAE's
    "L": Size(960, 12, 12, 480, 8, 12),
    # Primus (Wald et al. 2025), which has no decoder for pre-training: about half as wide and four blocks deep here
    "PrimusS": Size(396, 12, 6, 192, 4, 6),
    "PrimusB": Size(792, 12, 12, 384, 4, 12),
    "PrimusM": Size(864, 16, 12, 432, 4, 12),
    "PrimusL": Size(1056, 24, 16, 528, 4, 16),
    # timm's other sizes, for encoders from there; the decoder is the original MAE's
    "ViTTi": Size(192, 12, 3, 96, 4, 3),
    "ViTS": Size(384, 12, 6, 192, 4, 6),
    "ViTL": Size(1024, 24, 16, 512, 8, 16),
}

DECODERS = {
    "unetr": "U-Net decoder over hidden states of the encoder and the image; suffers least from large tokens",
    "sfpn": "U-Net decoder over a simple feature pyramid of the encoder's last map (ViTDet)",
    "upscale": "repeated upsampling of the encoder's last map; learns in few steps",
    "mae": "the pre-training decoder with new weights; best with small tokens (ViTiac, figure 5)",
    "unet": "nnU-Net's own U-Net, which the encoder's last map joins (hybrid); starts as nnU-Net",
}

POSITIONS = {
    "sine_cosine": "fixed positions that are added to the tokens (both papers)",
    "rotary": "attention sees how far apart two tokens are along each axis",
    "both": "sine-cosine and rotary positions; pre-training learns to use neighbours from the start",
}
POSITION_UNITS = ("token", "mm")

BLOCKS = {
    "vit": "the blocks of both papers",
    "modern": "gated MLP, a norm inside attention, and branches that start small (Primus)",
    "gated": "the same without the norm inside attention (the first Primus)",
}

TOKENIZERS = {
    "linear": "one linear layer (both papers)",
    "convolutional": "a residual convolutional stem inside each token",
}

ENCODER_SETTINGS = (
    "positions",
    "position_unit",
    "rotary_base",
    "blocks",
    "tokenizer",
    "norm_eps",
    "learned_positions",
    "register_tokens",
)

PRETRAINING_DECODERS = {
    "self": "visible and masked tokens attend to one another (MAE)",
    "cross": "masked tokens attend to visible ones alone (CrossMAE)",
}

UPSAMPLINGS = {
    "nearest": "nearest-neighbour interpolation and a 3x3x3 convolution; leaves hardly any checkerboard (ViTiac, 2.4)",
    "transposed": "transposed convolutions",
}

MODALITY_VECTORS = ("one_hot", "learned")

# the contrasts of AMAE (section 2.1) and other spellings of them
CONTRASTS = {
    "ADC": ("axadc", "apparent diffusion coefficient"),
    "TRACE": ("axtrace", "tracew", "trace-weighted", "dwi"),
    "T2": ("axt2", "t2w", "t2-weighted"),
    "GRE": ("gradient echo",),
    "SWI": ("susceptibility-weighted",),
    "T1": ("t1w", "t1-weighted"),
    "FLAIR": ("fluid-attenuated inversion recovery",),
}

LOSSES = ("dice_ce", "dice")
AUGMENTATIONS = ("loader", "device")
COMPILING = ("auto", "on", "off")
AXES = "zyx"  # of preprocessed arrays


def canonical_contrast(name: str) -> str:
    """Return the name by which contrasts are matched: the known one of a spelling, or the name itself in capitals."""
    spellings = {other: known for known, others in CONTRASTS.items() for other in others}
    return spellings.get(name.lower(), name.upper())
