"""The language-model module: its loss is transformers' own, its bits per byte are right, and it learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tenfold.core.data.text import TextDataModule
from tenfold.core.lm import CausalLM, llama_config

TEXT = "\n\n".join(f"The {n}th document says that {n} times {n} is {n * n}." for n in range(400))
SIZES = {"vocab_size": 300, "layers": 2, "dim": 32, "heads": 4, "ffn": 64, "max_length": 32}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Models this small lose more by sharing out work than they gain, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    return TextDataModule(str(tmp_path / "text.txt"), length=16, batch_size=8, vocab_size=300, val_fraction=0.1)


def trainer(**arguments):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"enable_checkpointing": False} | arguments,
    )


def built(**arguments) -> CausalLM:
    torch.manual_seed(0)
    module = CausalLM(**SIZES | arguments)
    module.configure_model()
    return module


@pytest.mark.parametrize("arguments", [{}, {"tie_embeddings": True}, {"kv_heads": 2}])
def test_loss_and_gradients_are_transformers_own(arguments):
    module = built(**arguments).double()
    tokens = torch.randint(300, (3, 17))
    ours = -module(tokens).mean()
    targets = tokens[:, 1:].contiguous()
    theirs = module.lm(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets).loss  # it computes in float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)

    parameters = list(module.parameters())
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


class GPT2(CausalLM):
    def build(self):
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=1, n_embd=32, n_head=2, n_positions=32))


def test_another_model_of_transformers_needs_only_build():
    module = GPT2(vocab_size=300)
    module.configure_model()
    module.eval()
    tokens = torch.randint(300, (2, 9))
    expected = module.lm(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(module(tokens), expected)


def test_bits_per_byte_is_its_definition(data):
    module = built()
    (metrics,) = trainer().validate(module, data, verbose=False)

    nats = tokens = size = 0.0
    for row in data.val:  # every row alone, so that no grouping into batches can hide an error
        logits = module.lm(row["tokens"][None, :-1]).logits[0].double()
        nats += F.cross_entropy(logits, row["tokens"][1:], reduction="sum").item()
        tokens += data.length
        size += len(data.tokenizer.decode(row["tokens"][1:]).replace("<|endoftext|>", "").encode())
    assert len(data.val) % data.batch_size  # the last batch is a smaller one
    assert metrics["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_two_devices_validate_as_one(data):  # forked: spawning would import everything twice more
    data.setup()
    if len(data.val) % 2 == 0:
        data.length += 1
        data.setup()
    assert len(data.val) % 2  # no equal shares without padding
    module = built()
    (alone,) = trainer().validate(module, data, verbose=False)
    (together,) = trainer(devices=2, strategy="ddp_fork").validate(module, data, verbose=False)
    assert together == pytest.approx(alone, rel=1e-5)


def test_training_learns_and_resumes_from_its_checkpoint(data, tmp_path):
    seed_everything(0, verbose=False)
    module = CausalLM(**SIZES, lr=1e-2, warmup_steps=5)
    fitting = trainer(max_steps=60, enable_checkpointing=True, default_root_dir=tmp_path)
    fitting.fit(module, data)
    assert fitting.callback_metrics["val/loss"] < 0.5 * math.log(300)
    assert fitting.callback_metrics["train/loss"] < 0.5 * math.log(300)

    path = tmp_path / "model.ckpt"
    fitting.save_checkpoint(path)
    torch.load(path, weights_only=True)
    loaded = CausalLM.load_from_checkpoint(path, weights_only=True)
    assert loaded.hparams == module.hparams
    tokens = torch.randint(300, (2, 9))
    assert torch.equal(loaded(tokens), module.eval()(tokens))

    loaded.lm.save_pretrained(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported(tokens).logits, module.lm(tokens).logits)


def test_equal_seeds_build_equal_models(data):
    def weights(draws):
        seed_everything(3, verbose=False)
        torch.rand(draws)  # what happens to the generator before `fit` is the caller's own affair
        seed_everything(3, verbose=False)
        module = CausalLM(**SIZES)
        trainer(max_steps=2).fit(module, data)
        return torch.cat([p.flatten() for p in module.parameters()])

    assert torch.equal(weights(0), weights(5))


@pytest.mark.parametrize("tied", [False, True])
def test_decay_spares_embeddings_and_vectors(data, tied):
    module = CausalLM(**SIZES, tie_embeddings=tied, weight_decay=0.3)
    fitting = trainer(max_steps=1, limit_val_batches=0)
    fitting.fit(module, data)
    groups = fitting.optimizers[0].param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay.pop(id(p)) for name, p in module.lm.named_parameters()}
    assert not decay
    assert ("lm_head.weight" in found) is not tied
    assert found["model.embed_tokens.weight"] == 0
    assert all(value == (0 if "norm" in name or "embed" in name else 0.3) for name, value in found.items())


def test_learning_rate_rises_and_falls(data):
    rates = []

    class Watch(CausalLM):
        def on_train_batch_start(self, batch, index):
            rates.append(self.optimizers().param_groups[0]["lr"])

    trainer(max_steps=40).fit(Watch(**SIZES, lr=1e-2, min_lr_ratio=0.2, warmup_steps=10), data)
    assert max(rates) == pytest.approx(1e-2)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(2e-3, rel=0.05)


def test_llama_config_says_what_was_asked():
    config = llama_config(**SIZES, kv_heads=2, attention="eager", rms_norm_eps=1e-4)
    assert (config.head_dim, config.num_key_value_heads, config.rms_norm_eps) == (8, 2, 1e-4)
    assert config._attn_implementation == "eager"
    assert (config.bos_token_id, config.eos_token_id) == (0, 0)
    with pytest.raises(ValueError, match="heads: 5 do not divide dim 32"):
        llama_config(**SIZES | {"heads": 5})
    with pytest.raises(ValueError, match="kv_heads: 3 do not divide heads 4"):
        llama_config(**SIZES, kv_heads=3)


def test_module_is_described_by_plain_values():
    assert issubclass(CausalLM, LightningModule)
    assert all(isinstance(v, int | float | str | bool | tuple | None) for v in CausalLM(**SIZES).hparams.values())


def test_separate_documents_do_not_see_each_other():
    torch.manual_seed(0)
    module = CausalLM(vocab_size=30, layers=2, dim=16, heads=2, ffn=24, separate_documents=True)
    module.configure_model()
    first, second = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 8, 9, 10, 11]])
    with torch.no_grad():
        together = module(torch.cat([first, second], dim=1))
        torch.testing.assert_close(together[:, :3], module(first))
        torch.testing.assert_close(together[:, 4:], module(second))
        module.hparams.separate_documents = False
        assert not torch.allclose(module(torch.cat([first, second], dim=1))[:, 4:], together[:, 4:])


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_initial_weights_have_the_given_spread(std):
    torch.manual_seed(0)
    module = CausalLM(vocab_size=64, layers=2, dim=64, heads=2, ffn=96, init_std=std)
    module.configure_model()
    for name, weight in module.lm.named_parameters():
        if weight.dim() > 1:
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
