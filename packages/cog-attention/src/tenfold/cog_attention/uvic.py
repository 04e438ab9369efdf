"""U-ViC: the U-ViT diffusion backbone with Cog attention in all but its first and last block."""

from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.kernels import cog_attention

Attention = Literal["cog", "softmax"]


class UViC(nn.Module, PyTorchModelHubMixin):
    """A vision transformer with long skip connections that predicts the noise in an image.

    Time, condition and image patches are all tokens of one sequence. Of the `depth + 1` blocks, `depth // 2` go in,
    one stands in the middle, `depth // 2` come out, each of these fed the output of its mirror image on the way in.
    With `attention="cog"` every block is Cog but the first and the last, which keep softmax, as in the paper's
    code; `attention="softmax"` is U-ViT (Bao et al., arXiv 2209.12152) and has the same parameters. It has
    `save_pretrained` and `from_pretrained`: a config.json of the arguments below, and safetensors.

    Args:
        image_size: height and width of the image or latent.
        patch_size: side of a patch, dividing `image_size`.
        channels: of the image.
        dim: width of the tokens.
        depth: an even number; the model has `depth + 1` blocks.
        heads: attention heads, dividing `dim`.
        attention: `cog` or `softmax`.
        classes: number of class labels, 0 for none.
        context: `(tokens, dim)` of a text condition (MS-COCO: CLIP's 77 tokens of 768), or None.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 2,
        channels: int = 3,
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
        attention: Attention = "cog",
        classes: int = 0,
        context: tuple[int, int] | None = None,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size: {patch_size} does not divide image_size, {image_size}")
        if dim % heads:
            raise ValueError(f"heads: {heads} does not divide dim, {dim}")
        if depth < 2 or depth % 2:
            raise ValueError(f"depth: must be even and at least 2, got {depth}")
        if attention not in ("cog", "softmax"):
            raise ValueError(f"attention: must be 'cog' or 'softmax', got {attention!r}")
        self.patch_size, self.dim = patch_size, dim
        patches = (image_size // patch_size) ** 2
        self.patch_embed = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        self.class_embed = nn.Embedding(classes, dim) if classes else None
        self.context_embed = nn.Linear(context[1], dim) if context else None
        self.extra_tokens = 1 + bool(classes) + (context[0] if context else 0)
        self.position = nn.Parameter(torch.empty(1, self.extra_tokens + patches, dim))

        kinds = ["softmax", *[attention] * (depth - 1), "softmax"]
        blocks = [Block(dim, heads, kind, skip=i > depth // 2) for i, kind in enumerate(kinds)]
        self.in_blocks = nn.ModuleList(blocks[: depth // 2])
        self.mid_block = blocks[depth // 2]
        self.out_blocks = nn.ModuleList(blocks[depth // 2 + 1 :])
        self.norm = nn.LayerNorm(dim)
        self.decode = nn.Linear(dim, patch_size**2 * channels)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.trunc_normal_(self.position, std=0.02)
        self.apply(_initialize)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        time: Float[Tensor, " batch"],
        *,
        label: Int[Tensor, " batch"] | None = None,
        context: Float[Tensor, "batch tokens context_dim"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The predicted noise in `images` at diffusion time `time`, on the scale 0 to 1000."""
        x = self.patch_embed(images)
        grid = x.shape[-2:]
        tokens = [x.flatten(2).transpose(1, 2)]
        for name, embed, value in (("label", self.class_embed, label), ("context", self.context_embed, context)):
            if (embed is None) != (value is None):
                raise ValueError(f"{name}: the model was built {'without' if embed is None else 'with'} one")
            if embed is not None:
                condition = embed(value)
                tokens.insert(0, condition[:, None] if condition.dim() == 2 else condition)
        tokens.insert(0, time_embedding(time, self.dim).to(x.dtype)[:, None])
        x = torch.cat(tokens, dim=1)
        if x.shape[1] != self.position.shape[1]:
            raise ValueError(
                f"images: {tuple(images.shape)} make {x.shape[1]} tokens, but the model has positions for "
                f"{self.position.shape[1]}"
            )
        x = x + self.position

        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())

        patches = self.decode(self.norm(x))[:, self.extra_tokens :]
        # (B, h·w, p·p·C) to (B, C, h·p, w·p), patches laid out pixel by pixel as in U-ViT
        image = patches.unflatten(1, grid).unflatten(-1, (self.patch_size, self.patch_size, -1))
        return self.smooth(image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


class Block(nn.Module):
    """A pre-norm transformer block; with `skip` it first folds in its mirror block's output."""

    def __init__(self, dim: int, heads: int, attention: Attention, *, skip: bool):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """`(batch, tokens, dim)` to the same."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attend = cog_attention if self.attention == "cog" else F.scaled_dot_product_attention
        x = x + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def extra_repr(self) -> str:
        """The attention, for `print(model)`."""
        return f"attention={self.attention!r}, heads={self.heads}"


def time_embedding(time: Float[Tensor, " batch"], dim: int) -> Float[Tensor, "batch dim"]:
    """Cosines and sines of `time` at `dim / 2` frequencies from 1 down to 1/10 000."""
    half = dim // 2
    frequencies = 10_000 ** (-torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
