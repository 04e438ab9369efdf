"""Train a small language model on a text file of your own: `uv run python FILE book.txt`."""

import sys

from tenfold.core.data.text import TextDataModule
from tenfold.core.lm import CausalLM
from tenfold.core.training import fit

path = sys.argv[1] if len(sys.argv) > 1 else None  # without one: the Wikipedia introductions
data = TextDataModule(path, length=64, batch_size=8, vocab_size=512)
module = CausalLM(vocab_size=512, layers=2, dim=64, heads=2, ffn=172, warmup_steps=10)
metrics = fit(module, data, steps=100, seed=0, clip=1.0)
print(f"{metrics['val/bits_per_byte']:.3f} bits per byte after 100 updates")
