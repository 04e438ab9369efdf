"""Recycle routing in a layer of your own, with learning rates by expert and three phases: `uv run python FILE`."""

import torch
from torch import nn
from torch.nn import functional as F

from tenfold.hunyuan_moe import MoELayer, expert_lr_ratio, expert_parameter_groups, three_phase

STEPS = 300
torch.manual_seed(0)
directions, functions = torch.randn(8, 32), torch.randn(8, 32, 32) / 32**0.5
moe = MoELayer(dim=32, ffn=32, experts=8, routing="recycle", capacity_factor=1.0)
model = nn.ModuleDict({"moe": moe, "head": nn.Linear(32, 32)})
ratio = expert_lr_ratio(x=0.26, experts=8)
optimizer = torch.optim.AdamW(expert_parameter_groups(model, lr=1e-2, ratio=ratio))
schedule = three_phase(optimizer, warmup_steps=20, total_steps=STEPS)
print(f"specialized experts learn at {ratio:.2f} of the learning rate")
for step in range(STEPS):
    # Eight kinds of tokens, some more frequent than others, each with its own function to be learned.
    kind = torch.multinomial(torch.arange(1.0, 9), 512, replacement=True)
    x = directions[kind] + torch.randn(512, 32)
    y, routing = moe(x)
    task = F.mse_loss(model["head"](y), (x[:, None] @ functions[kind])[:, 0])
    (task + 0.01 * routing.balance_loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 60 == 59:
        s = moe.statistics
        print(f"step {step + 1}: loss {task.item():.3f}, recycled {s.recycled:.0%}, dropped {s.dropped:.0%}")
moe.eval()(x)  # without a capacity
print("tokens of each expert in evaluation:", moe.statistics.load.tolist())
