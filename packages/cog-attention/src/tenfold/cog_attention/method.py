"""What the `tenfold` command knows of this package."""

from lightning import LightningDataModule, LightningModule

from tenfold.core.methods import Method

from .export import export
from .reproduction import claims

METHOD = Method(
    name="cog-attention",
    title="Cog Attention: attention with negative weights",
    paper="More Expressive Attention with Negative Weights, arXiv 2411.07176",
    module=LightningModule,
    datamodule=LightningDataModule,
    package="tenfold.cog_attention",
    claims=(
        claims.language_loss,
        claims.collapse,
        claims.heads,
        claims.one_head_subtraction,
        claims.diffusion_loss,
    ),
    export=export,
)
