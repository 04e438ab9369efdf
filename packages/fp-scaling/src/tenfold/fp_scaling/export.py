"""What `tenfold export` writes of this package's models."""

from pathlib import Path

from tenfold.core.export import save_language_model

from .module import QuantizedLM


def export(module: QuantizedLM, folder: Path) -> str:
    """Write the Llama for transformers; the Python that loads it and quantizes it as it was trained."""
    h = module.hparams
    if h.fmt is None:
        return save_language_model(module, folder)
    settings = {n: h[n] for n in ("targets", "scale", "block_size", "block_axis", "rounding")}
    given = ", ".join([repr(h.fmt), *(f"{name}={value!r}" for name, value in settings.items())])
    return save_language_model(
        module,
        folder,
        imports="from tenfold.fp_scaling import QuantRecipe, quantize_linears_",
        after=f"quantize_linears_(model, QuantRecipe({given}))",
    )
