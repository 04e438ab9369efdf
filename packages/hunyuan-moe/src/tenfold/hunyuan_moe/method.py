"""What the `tenfold` command knows of this package."""

from functools import partial

from lightning import LightningDataModule, LightningModule

from tenfold.core.export import save_language_model
from tenfold.core.methods import Method

from . import verbs
from .reproduction import claims

METHOD = Method(
    name="hunyuan-moe",
    title="Hunyuan-Large: mixture of experts with recycle routing",
    paper="Hunyuan-Large: An Open-Source MoE Model with 52 Billion Activated Parameters by Tencent, arXiv 2411.02265",
    module=LightningModule,
    datamodule=LightningDataModule,
    package="tenfold.hunyuan_moe",
    claims=(
        claims.recycle_routing,
        claims.expert_learning_rate,
        claims.cache,
        claims.schedule,
        claims.scaling_law,
    ),
    export=partial(save_language_model, imports="from tenfold.hunyuan_moe import register", before="register()"),
    verbs={"scaling": verbs.scaling, "synthesize": verbs.synthesize},
)
