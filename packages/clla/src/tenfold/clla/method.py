"""What the `tenfold` command knows of this package."""

from functools import partial

from tenfold.core.data.text import TextDataModule
from tenfold.core.export import save_language_model
from tenfold.core.methods import Method

from . import verbs
from .module import CLLAModule
from .reproduction import claims

METHOD = Method(
    name="clla",
    title="Cross-Layer Latent Attention: a KV cache under 2 %",
    paper="Lossless KV Cache Compression to 2%, arXiv 2410.15252",
    module=CLLAModule,
    datamodule=TextDataModule,
    package="tenfold.clla",
    claims=(claims.ladder_loss, claims.recall, claims.cache_bytes, claims.latent_rounding, claims.decode_time),
    export=partial(save_language_model, imports="from tenfold.clla import register", before="register()"),
    verbs={"budget": verbs.budget, "convert": verbs.convert},
)
