"""What the `tenfold` command knows of this package."""

from lightning import LightningDataModule, LightningModule

from tenfold.core.methods import Method

from . import verbs
from .export import export
from .reproduction import claims

METHOD = Method(
    name="fp-scaling",
    title="floating-point quantized training and its scaling law",
    paper="Scaling Laws for Floating-Point Quantization Training, arXiv 2501.02423",
    module=LightningModule,
    datamodule=LightningDataModule,
    package="tenfold.fp_scaling",
    claims=(
        claims.exponent_or_mantissa,
        claims.targets,
        claims.block_size,
        claims.data_and_parameters,
        claims.law_on_held_out_runs,
        claims.more_data_hurts,
        claims.one_exponent_bit_is_none,
    ),
    export=export,
    verbs={"plan": verbs.plan, "sweep": verbs.sweep, "fit-law": verbs.fit_law},
)
