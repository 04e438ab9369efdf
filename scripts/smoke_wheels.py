# /// script
# requires-python = ">=3.11"
# dependencies = ["packaging>=24"]
# ///
"""Install every wheel of a folder alone into a bare environment, and use it there.

    uv build --all-packages --no-sources --out-dir dist
    uv run --script scripts/smoke_wheels.py dist

The workspace's own environment holds everything, so a dependency that nobody declared shows only here.
Siblings come from the folder, everything else from the user's index.
"""

import argparse
import email
import subprocess
import sys
import tempfile
import time
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

USES = {
    "tenfold-kernels": """
import torch
from tenfold.kernels import (
    cog_attention, expert_swiglu, fake_quantize, grouped_matmul, grouped_swiglu, latent_attention, linear_logprob,
    pack_latents, permute_tokens, route_tokens, unpermute_tokens, use_backend,
)
query, key, value = torch.randn(3, 1, 2, 5, 8, requires_grad=True).unbind()
cog_attention(query, key, value, causal=True).sum().backward()
hidden, weight, target = torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,))
expected = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
torch.testing.assert_close(linear_logprob(hidden, weight, target), expected)
assert fake_quantize(torch.tensor([0.3, 2.5]), "e2m1").tolist() == [0.5, 2.0]
codes = pack_latents(torch.randn(1, 9, 64), code="float")
assert latent_attention(torch.randn(1, 2, 1, 64), None, codes, None, scale=0.1).shape == (1, 2, 1, 64)
routing = route_tokens(torch.randn(32, 4), capacity=8)
rows, offsets = permute_tokens(torch.randn(32, 6), routing)
rows = grouped_matmul(rows, torch.randn(4, 6, 6), offsets)
rows = grouped_swiglu(rows, torch.randn(4, 10, 6), torch.randn(4, 6, 5), offsets)
assert unpermute_tokens(rows, routing).shape == (32, 6)
from tenfold.kernels.moe import compiled
assert compiled.SOURCE.is_file()
experts = torch.randn(32, 16), torch.randn(4, 64, 16), torch.randn(4, 16, 32), routing
out = expert_swiglu(*experts)
with use_backend("reference"):
    torch.testing.assert_close(out, expert_swiglu(*experts), rtol=1e-4, atol=1e-3)
""",
    "tenfold-core": """
import subprocess, sys
from pathlib import Path
tenfold = Path(sys.executable).with_name("tenfold")
for arguments in (["--help"], ["list"]):
    subprocess.run([tenfold, *arguments], check=True)
answer = subprocess.run([tenfold, "info", "no-such-method"], capture_output=True, text=True)
assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer
""",
    "tenfold-cog-attention": """
import subprocess, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tenfold.cog_attention import keep_softmax, register
register()
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=None, attn_implementation="cog",
)
model = LlamaForCausalLM(config).eval()
keep_softmax(model)
tokens = torch.randint(2, 64, (1, 7))
logits = model(tokens).logits
assert logits.isfinite().all()
longer = model.generate(tokens, max_new_tokens=3, do_sample=False)
assert longer.shape == (1, 10) and longer[0, 7] == logits[0, -1].argmax()
listed = subprocess.check_output([Path(sys.executable).with_name("tenfold"), "list"], text=True)
assert "cog-attention" in listed, listed
""",
    "tenfold-fp-scaling": """
import subprocess, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tenfold.fp_scaling import QuantLinear, QuantRecipe, ScalingLaw, quantize_linears_
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=1, eos_token_id=None,
)
model = quantize_linears_(LlamaForCausalLM(config), QuantRecipe("e2m1", block_size=16))
tokens = torch.randint(2, 64, (2, 9))
model(tokens, labels=tokens).loss.backward()
assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 7
assert model.model.layers[0].mlp.up_proj.weight.grad.isfinite().all()
assert ScalingLaw.paper().best_split(8).name == "e4m3"
tenfold = Path(sys.executable).with_name("tenfold")
plan = [tenfold, "fp-scaling", "plan", "--params", "7e9", "--tokens", "2e12", "--bits", "8"]
assert "e4m3" in subprocess.check_output(plan, text=True)
assert Path("plan.svg").stat().st_size > 1000
""",
    "tenfold-clla": """
import subprocess, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from tenfold.clla import CLLACache, CLLAConfig, CLLAForCausalLM, bytes_per_token, register
config = CLLAConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, latent_dim=16,
    rope_dim=8, cache_bits=4, bos_token_id=1, eos_token_id=None,
)
model = CLLAForCausalLM(config).eval()
tokens = torch.randint(2, 64, (1, 7))
cache = CLLACache(config, max_length=9)
longer = model.generate(tokens, past_key_values=cache, max_new_tokens=3, do_sample=False)
assert longer.shape == (1, 10) and longer[0, 7] == model(tokens).logits[0, -1].argmax()
assert cache.nbytes() == 9 * bytes_per_token(config)
model.save_pretrained("model")
register()
assert type(AutoModelForCausalLM.from_pretrained("model")) is CLLAForCausalLM
tenfold = Path(sys.executable).with_name("tenfold")
assert "1.82 %" in subprocess.check_output([tenfold, "clla", "budget"], text=True)
""",
    "tenfold-hunyuan-moe": """
import subprocess, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from tenfold.hunyuan_moe import HunyuanLargeConfig, HunyuanLargeForCausalLM, register
config = HunyuanLargeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, num_experts=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=None,
)
model = HunyuanLargeForCausalLM(config)
tokens = torch.randint(2, 64, (2, 7))
model(tokens, labels=tokens).loss.backward()
model.eval().save_pretrained("saved")
register()
again = AutoModelForCausalLM.from_pretrained("saved")
assert torch.equal(again(tokens).logits, model(tokens).logits)
assert again.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 10)
from transformers import LlamaConfig, LlamaForCausalLM
from tenfold.hunyuan_moe import flops_per_token, share_key_values
assert flops_per_token(config, 7).total > 0
llama = share_key_values(LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4, eos_token_id=None,
)))
assert llama.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 10)
tenfold = Path(sys.executable).with_name("tenfold")
answer = subprocess.check_output([tenfold, "hunyuan-moe", "scaling", "--compute", "3.1088e24"], text=True)
assert "58.1B" in answer, answer
""",
}


def inspect(wheel: Path) -> list[str]:
    """What is wrong with the wheel's own files and metadata; nothing is installed."""
    files, info, metadata = contents(wheel)
    package = distribution(wheel).replace("-", "/", 1).replace("-", "_")
    problems = [
        f"{file} is missing" for file in (f"{package}/py.typed", f"{info}/licenses/LICENSE") if file not in files
    ]
    problems += [f"installs {file}" for file in files if not within(file, f"{package}/", f"{info}/")]
    if not metadata.get_payload().strip():
        problems.append("the description is empty: is there a README?")
    for requirement in requirements(metadata):
        if requirement.name == "kernels":
            problems.append("requires `kernels`, which is another project's package")
        if requirement.url:
            problems.append(f"requires {requirement}: an address where a range belongs")
        if requirement.name.startswith("tenfold-") and {bound.operator for bound in requirement.specifier} != {
            ">=",
            "<",
        }:
            problems.append(f"requires {requirement}: the range of a sibling needs a lower and an upper bound")
    return problems


def contents(wheel: Path) -> tuple[list[str], str, Message]:
    """The names of its files, its .dist-info folder, and its metadata."""
    with ZipFile(wheel) as archive:
        files = archive.namelist()
        [path] = [file for file in files if file.endswith(".dist-info/METADATA")]
        return files, path.split("/")[0], email.message_from_bytes(archive.read(path))


def requirements(metadata: Message) -> list[Requirement]:
    """What the wheel requires, extras too."""
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def within(file: str, *folders: str) -> bool:
    """Whether a file, or a folder's own entry in the archive, belongs to one of `folders`."""
    return file.startswith(folders) or (file.endswith("/") and any(folder.startswith(file) for folder in folders))


def distribution(wheel: Path) -> str:
    """The distribution's name as in pyproject.toml."""
    return wheel.name.split("-")[0].replace("_", "-")


def use(wheel: Path, wheels: list[Path], *, resolution: str, python: str | None) -> None:
    """Install `wheel` alone into a new environment and run its lines of USES there, isolated."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        siblings = Path(folder, "siblings.txt")
        # A constraint with an address: the range stays the wheel's own, but no index answers for a sibling.
        siblings.write_text("".join(f"{distribution(w)} @ {w.as_uri()}\n" for w in wheels))
        version = ["--python", python] if python else []
        uv("venv", "--quiet", *version, str(environment), folder=folder)
        options = ["--python", str(environment), "--constraints", str(siblings), "--resolution", resolution]
        # What the wheel requires is named, too: `lowest-direct` takes the lowest version of what is named alone.
        named = [
            str(requirement)
            for requirement in requirements(contents(wheel)[2])
            if not requirement.name.startswith("tenfold-") and "extra" not in str(requirement.marker)
        ]
        uv("pip", "install", "--quiet", *options, str(wheel), *named, folder=folder)
        interpreter = environment / "bin" / "python"
        subprocess.run([interpreter, "-I", "-c", USES[distribution(wheel)]], cwd=folder, check=True)


def uv(*arguments: str, folder: str) -> None:
    """Run uv, away from the workspace, whose own constraints no user has; its message says what went wrong."""
    subprocess.run(["uv", *arguments], cwd=folder, check=True)


def main() -> None:
    """Inspect and use every wheel of the folder; exit 1 when one fails, after all were tried."""
    parser = argparse.ArgumentParser(prog="smoke_wheels.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds the wheels of all packages, as `uv build` leaves them")
    parser.add_argument(
        "--resolution",
        choices=["highest", "lowest-direct"],
        default="highest",
        help="lowest-direct tests the lower bounds that the packages declare",
    )
    parser.add_argument("--python", help="the interpreter of the environments, such as 3.13")
    arguments = parser.parse_args()
    wheels = sorted(arguments.folder.resolve().glob("*.whl"))
    if not wheels:
        parser.error(f"folder: no wheels in {arguments.folder}")
    failed = 0
    for wheel in wheels:
        start = time.monotonic()
        problems = inspect(wheel)
        if distribution(wheel) not in USES:
            problems.append("no lines in USES say what to do with it")
        else:
            try:
                use(wheel, wheels, resolution=arguments.resolution, python=arguments.python)
            except subprocess.CalledProcessError as error:
                problems.append(f"exit status {error.returncode} of {Path(error.cmd[0]).name}, see above")
        print(f"{wheel.name}: {'; '.join(problems) or 'ok'} ({time.monotonic() - start:.0f} s)", flush=True)
        failed += bool(problems)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
