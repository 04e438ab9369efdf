"""A CLLA model from a Llama, Mistral or Qwen2 checkpoint: keys and values factored, ready for healing by training."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from tenfold.core.data.corpus import Corpus
from tenfold.core.errors import UserError

from .config import CLLAConfig, Scales
from .factorize import Factors, Run, factorize, rotary_components, square_root
from .formats import Code
from .model import CLLAForCausalLM
from .steps import calibrate_steps, normal_step

SUPPORTED = ("llama", "mistral", "qwen2")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the length


def checkpoint_config(folder: Path) -> PreTrainedConfig:
    """The config in `folder`, which must be of a kind that can be converted.

    Raises:
        UserError: it is not.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"checkpoint: {folder} is not a folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        raise UserError(f"checkpoint: {folder}/config.json cannot be read: {_gist(error)}") from error
    if config.model_type not in SUPPORTED:
        raise UserError(
            f"checkpoint: model_type {config.model_type!r} cannot be converted; accepted: {', '.join(SUPPORTED)}"
        )
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"} or (config.model_type == "mistral" and config.sliding_window is not None):
        raise UserError("checkpoint: has sliding windows, which a CLLA model has not")
    if config.rope_parameters["rope_type"] not in _ROPE_TYPES:
        raise UserError(
            f"checkpoint: rope_type {config.rope_parameters['rope_type']!r} cannot be converted; accepted: "
            f"{', '.join(_ROPE_TYPES)}"
        )
    try:
        check_attention(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    return config


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """The model in `folder`, which must be whole.

    Raises:
        UserError: it is not.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # found below, and named
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint: {folder} is damaged or not whole: {_gist(error)}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        if names:
            raise UserError(
                f"checkpoint: {folder}: {kind.replace('_', ' ')}: {', '.join(names[:3])}, {len(names)} in all"
            )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"checkpoint: {folder}: {name} holds numbers that are not finite")
    return model.eval()


@torch.no_grad()
def convert_model(
    source: PreTrainedModel,
    *,
    latent_dim: int,
    rope_dim: int,
    share_factor: int = 2,
    cache_bits: int = 4,
    cache_code: Code = "symmetric",
    cache_scales: Scales = "token",
    window: int = 256,
    calibration: Tensor | None = None,
) -> tuple[CLLAForCausalLM, list[dict[str, float]]]:
    """A CLLA model with `source`'s weights, its keys and values factored; and each layer's relative errors.

    Exact where nothing has to be left out: `share_factor` 1, a `rope_dim` of all key heads, a latent as wide as the
    values.

    Args:
        source: a Llama, Mistral or Qwen2 for causal language modelling.
        latent_dim: numbers of the latent.
        rope_dim: numbers of the rotary key.
        share_factor: layers that share a cache.
        cache_bits: 4, 8 or 16.
        cache_code: `symmetric`, `asymmetric` or `float`.
        cache_scales: `token` or `channel`. Steps are calibrated on `calibration`; without it they are those of least
            squared error for normal numbers of unit variance, as the latent's are if the hidden states are white.
        window: distances over which unrotated keys shall be right on average.
        calibration: tokens `(rows, time)` to run `source` on; None takes its normed hidden states to be white.

    Raises:
        ValueError: sizes that do not go together, or attention other than softmax.
    """
    check_attention(source.config)
    layers, rotary = source.model.layers, source.model.rotary_emb
    attention = [layer.self_attn for layer in layers]
    biased = calibration is not None or has_biases(source.config)
    if window < 1:
        raise ValueError(f"window: must be at least 1, got {window}")
    config = converted_config(
        source.config,
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        share_factor=share_factor,
        biased=biased,
        cache_bits=cache_bits,
        cache_code=cache_code,
        cache_scales=cache_scales,
    )
    producers = config.cache_producers
    moments = None if calibration is None else _moments(source, calibration, producers)
    frequencies = rotary.inv_freq.double().cpu()

    groups = [[i for i, producer in enumerate(producers) if producer == g] for g in sorted(set(producers))]
    runs = [_run(source, group, biased, moments) for group in groups]
    components = rotary_components(runs, frequencies, rope_dim=rope_dim, window=window)
    config.rope_frequencies = [f for f, n in zip(frequencies.tolist(), components, strict=True) for _ in range(n)]
    with torch.device("meta"):
        model = CLLAForCausalLM(config)
    state = {name: weight for name, weight in source.state_dict().items() if ".self_attn." not in name}
    errors: list[dict[str, float]] = []
    # The scores of d_h + d_r numbers are divided by another root, and long-context rotations come with a factor.
    scale = ((config.head_dim + rope_dim) / config.head_dim) ** 0.5 * rotary.attention_scaling**2
    for group, run in zip(groups, runs, strict=True):
        factors = factorize(run, frequencies, components, latent_dim=latent_dim, window=window)
        errors += factors.errors
        state |= _weights(group, factors, attention, scale, biased)
        if cache_scales == "channel":
            step = normal_step(config.cache_formats(group[0])[0])
            state[f"model.layers.{group[0]}.self_attn.latent_steps"] = torch.full((latent_dim,), step)
    state = {name: weight.to(source.dtype).contiguous() for name, weight in state.items()}
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    # Buffers that are not saved are made again, off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if calibration is not None and cache_scales == "channel" and cache_bits < 16:
        calibrate_steps(model, calibration.to(source.device))
    return model.eval(), errors


def calibration_tokens(folder: Path, text: Path, count: int, config: PreTrainedConfig) -> Tensor:
    """`count` tokens of `text` by the checkpoint's own tokenizer, in rows of up to 512."""
    length = min(512, config.max_position_embeddings)
    if count < length:
        raise UserError(f"tokens: must be at least {length}, a row, got {count}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        documents = Corpus(text, val_fraction=0.01).documents("train")
    except (ValueError, OSError) as error:
        raise UserError(f"calibration: {_gist(error)}") from error
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document)["input_ids"]
        if len(ids) >= count:
            break
    if len(ids) < length:
        raise UserError(f"calibration: {text} has {len(ids)} tokens, fewer than a row of {length}")
    return torch.tensor(ids[: min(count, len(ids)) // length * length]).view(-1, length)


def converted_config(
    source: PreTrainedConfig, *, latent_dim: int, rope_dim: int, share_factor: int, biased: bool, **cache
) -> CLLAConfig:
    """The config of what `convert_model` makes of a model of config `source`; no weights are needed to refuse it.

    Raises:
        ValueError: a value that is not accepted, or sizes for which the keys and values have no room.
    """
    names = """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act
        max_position_embeddings initializer_range rms_norm_eps pad_token_id bos_token_id eos_token_id
        tie_word_embeddings
    """.split()  # noqa: SIM905
    heads = source.num_attention_heads
    config = CLLAConfig(
        **{name: getattr(source, name) for name in names},
        head_dim=getattr(source, "head_dim", None) or source.hidden_size // heads,
        num_key_value_heads=heads,
        attention_bias=biased,
        mlp_bias=getattr(source, "mlp_bias", False),
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        share_factor=share_factor,
        **cache,
        latent_norm=False,  # it would throw away each latent's length, which the source's values depend on
    )
    # The ranks that rotary_components and factorize find, in the run that has the fewest layers.
    keys = source.num_key_value_heads * min(map(config.cache_producers.count, set(config.cache_producers)))
    width = source.hidden_size + int(biased)
    limits = {
        "latent_dim": (latent_dim, min(2 * keys * config.head_dim, width)),
        "rope_dim": (rope_dim, min(keys, width) * config.head_dim),
    }
    told = [f"{name}: at most {limit}, got {given}" for name, (given, limit) in limits.items() if given > limit]
    if told:
        raise ValueError(f"{'; '.join(told)}: the keys and values of a run have no more")
    return config


def check_attention(config: PreTrainedConfig) -> None:
    """Refuse a model whose attention is another function of queries and keys than softmax, Cog Attention say.

    Raises:
        ValueError: it is.
    """
    name = config._attn_implementation
    plain = name is None or name in ("eager", "sdpa", "flex_attention") or name.startswith("flash_attention")
    if not plain:
        raise ValueError(
            f"checkpoint: its attention is {name!r}; a CLLA model has softmax attention, so it would differ"
        )


def has_biases(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint's queries, keys and values have biases."""
    return config.model_type == "qwen2" or getattr(config, "attention_bias", False)


def _run(source: PreTrainedModel, group: list[int], biased: bool, moments: dict | None) -> Run:
    """The maps of a run's layers, its readers' keys and values brought to the producer's input."""
    queries, keys, values = [], [], []
    gains = [source.model.layers[layer].input_layernorm.weight.double() for layer in group]
    for layer, gain in zip(group, gains, strict=True):
        module = source.model.layers[layer].self_attn
        q, k, v = (_map(getattr(module, f"{name}_proj"), module.head_dim, biased) for name in "qkv")
        queries.append(q)
        if moments is not None and layer != group[0]:
            cross, own = moments[layer], moments[group[0]]
            change = torch.linalg.solve(own, cross.T).T  # E[x_l xᵀ] E[x xᵀ]⁻¹
        else:
            ratio = gain / gains[0].where(gains[0].abs() > 1e-6, 1e-6)
            change = torch.diag(torch.cat([ratio, ratio.new_ones(int(biased))]))
        keys.append(k @ change)
        values.append(v @ change)
    if moments is not None:
        root = square_root(moments[group[0]])
    else:
        root = torch.diag(torch.cat([gains[0].abs().clamp(min=1e-6), gains[0].new_ones(int(biased))]))
    return Run(queries, keys, values, root)


def _map(linear: torch.nn.Linear, head_dim: int, biased: bool) -> Tensor:
    """A projection's weights `(heads, head_dim, d)`, its bias one column more."""
    weight = linear.weight.double()
    if biased:
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()
        weight = torch.cat([weight, bias[:, None]], dim=1)
    return weight.unflatten(0, (-1, head_dim))


def _weights(group: list[int], factors: Factors, attention, scale: float, biased: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}

    def put(layer: int, name: str, weight: Tensor, affine: bool) -> None:
        prefix = f"model.layers.{layer}.self_attn.{name}"
        if affine and biased:
            state[f"{prefix}.bias"], weight = weight[:, -1], weight[:, :-1]
        state[f"{prefix}.weight"] = weight

    put(group[0], "kv_down_proj", factors.down, affine=True)
    put(group[0], "k_rope_proj", factors.rope, affine=True)
    for i, layer in enumerate(group):
        put(layer, "q_proj", scale * factors.query[i].flatten(0, 1), affine=True)
        put(layer, "k_up_proj", factors.key_up[i].flatten(0, 1), affine=False)
        put(layer, "v_up_proj", factors.value_up[i].flatten(0, 1), affine=False)
        out = attention[layer].o_proj
        put(layer, "o_proj", out.weight, affine=False)
        if biased:
            bias = out.weight.new_zeros(len(out.weight)) if out.bias is None else out.bias
            state[f"model.layers.{layer}.self_attn.o_proj.bias"] = bias
    return state


def _moments(source: PreTrainedModel, tokens: Tensor, producers: list[int]) -> dict[int, Tensor]:
    """E[x̃_l x̃_gᵀ] for each layer l and its producer g, x̃ the normed input with a 1 appended."""
    sums: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def note(layer: int, x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        inputs[layer] = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        product = inputs[layer].T @ inputs[producers[layer]] / tokens.numel()
        sums[layer] = sums[layer] + product if layer in sums else product

    hooks = [
        layer.input_layernorm.register_forward_hook(lambda module, args, out, i=i: note(i, out))
        for i, layer in enumerate(source.model.layers)
    ]
    try:
        for row in tokens:
            source.model(input_ids=row[None].to(source.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    ridge = 1e-6
    for producer in set(producers):
        sums[producer] += ridge * sums[producer].trace() / len(sums[producer]) * torch.eye(len(sums[producer]))
    return sums


def _gist(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
