"""The recall task: what it asks can be answered, and only from the sequence."""

import pytest
import torch

from tenfold.clla.reproduction.recall import KEYS, VALUES, VOCABULARY, RecallData, RecallModule, RecallSequences
from tenfold.core.training import fit


def test_each_question_has_its_answer_in_the_sequence():
    for item in (RecallSequences(9, 20, seed=3)[i] for i in range(20)):
        shown, asked = item["tokens"].split(9)
        value = {int(token) // VALUES: int(token) % VALUES for token in shown}
        assert len(value) == 9
        assert [value[int(token) - KEYS * VALUES] for token in asked] == item["answers"].tolist()
        assert asked.max() < VOCABULARY


def test_sequences_are_drawn_by_seed_and_index():
    first, again = RecallSequences(5, 10, seed=1)[7], RecallSequences(5, 10, seed=1)[7]
    assert first["tokens"].equal(again["tokens"])
    assert not first["tokens"].equal(RecallSequences(5, 10, seed=2)[7]["tokens"])
    data = RecallData(pairs=5, batch_size=4, seed=1)
    shown = next(iter(data.train_dataloader()))["tokens"]
    assert not shown.equal(next(iter(data.val_dataloader()))["tokens"][:4])


def test_a_model_learns_to_recall():
    sizes = {"layers": 2, "dim": 32, "heads": 2, "ffn": 64, "latent_dim": 16, "rope_dim": 4, "share_factor": 1}
    module = RecallModule(vocab_size=VOCABULARY, max_length=4, lr=1e-2, warmup_steps=20, init_std=0.07, **sizes)
    metrics = fit(module, data := RecallData(pairs=2, batch_size=64, seed=0), steps=300, seed=0, clip=1.0)
    assert metrics["val/accuracy"] > 0.9  # one of the two values, without looking at the key: 0.5
    module.eval()
    assert module.accuracy(data.val_dataloader()) == pytest.approx(metrics["val/accuracy"])


def test_pairs_beyond_the_keys_are_refused():
    with pytest.raises(ValueError, match=f"pairs: must be from 1 to {KEYS}, got {KEYS + 1}"):
        RecallSequences(KEYS + 1, 1, seed=0)
    assert torch.is_tensor(RecallSequences(KEYS, 1, seed=0)[0]["tokens"])
