"""What the `tenfold` command knows of this package."""

from lightning import LightningDataModule, LightningModule

from tenfold.core.methods import Method

from .verbs import fit_law, plan

METHOD = Method(
    name="fp-scaling",
    title="floating-point quantized training and its scaling law",
    paper="Scaling Laws for Floating-Point Quantization Training, arXiv 2501.02423",
    module=LightningModule,
    datamodule=LightningDataModule,
    package="tenfold.fp_scaling",
    verbs={"plan": plan, "fit-law": fit_law},
)
