"""The trainer settings of the papers' configs go together; their models' sizes are tested with each method."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("paper_steps.py")


def test_every_paper_config_takes_a_step(tmp_path):
    text = tmp_path / "numbers.txt"
    text.write_text("\n\n".join(" ".join(str(i * j % 97) for j in range(60)) for i in range(60)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(text)],
        env=os.environ | {"TENFOLD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tried = [line.split()[:2] for line in done.stdout.splitlines() if "Strategy" in line]
    assert {method for method, _ in tried} == {"clla", "cog-attention", "fp-scaling", "hunyuan-moe"}
    assert len(tried) >= 10
