"""What `tenfold export` writes of this package's models."""

from pathlib import Path

from lightning import LightningModule

from tenfold.core.export import save_language_model

from .diffusion import UViCModule


def export(module: LightningModule, folder: Path) -> str:
    """Write a Cogformer for transformers, a U-ViC by its own `save_pretrained`; the Python that loads it."""
    if isinstance(module, UViCModule):
        module.model.save_pretrained(folder)
        return "from tenfold.cog_attention import UViC\n\nmodel = UViC.from_pretrained(folder)"
    if module.hparams.attention != "cog":
        return save_language_model(module, folder)
    return save_language_model(
        module, folder, imports="from tenfold.cog_attention import register", before="register()"
    )
