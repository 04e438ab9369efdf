"""What `tenfold export` writes of every method's small models loads in another process, and computes the same."""

import subprocess
import sys

import pytest
import torch
import yaml

from tenfold.core import methods
from tenfold.core.export import save_language_model
from tenfold.core.lm import CausalLM
from tenfold.core.trained import build_module

CHECK = """
import sys, torch
for name in sys.argv[1:]:
    folder = name
    scope = {"folder": folder}
    exec(open(f"{folder}/code.py").read(), scope)
    given, expected = torch.load(f"{folder}/case.pt")
    with torch.no_grad():
        out = scope["model"].eval()(*given)
    torch.testing.assert_close(getattr(out, "logits", out), expected, msg=lambda text: f"{folder}: {text}")
"""


def small_configs():
    found = []
    for name in methods.installed():
        method = methods.load(name)
        found += [(method, file) for stem, file in methods.configs(method.package).items() if "tiny" in stem]
    return found


@pytest.mark.filterwarnings("ignore")
def test_exports(tmp_path):
    folders, unsaid = [], []
    for method, file in small_configs():
        torch.manual_seed(0)
        module = build_module(yaml.safe_load(file.read_text())["model"], file)
        module.configure_model()
        if method.export is None and not isinstance(module, CausalLM):
            unsaid.append(method.name)
            continue
        folder = tmp_path / f"{method.name}-{file.stem}"
        folder.mkdir()
        code = (method.export or save_language_model)(module.eval(), folder)
        (folder / "code.py").write_text(code)
        case = cases(module)
        if case is not None:
            torch.save(case, folder / "case.pt")
            folders.append(str(folder))
        assert list(folder.glob("*.safetensors"))
        assert not list(folder.glob("*.bin"))
    done = subprocess.run([sys.executable, "-c", CHECK, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(folders) >= 5, "the four language models and the diffusion model"
    if unsaid:
        pytest.skip(f"everything else holds, but these do not say what their export is: {', '.join(unsaid)}")


def cases(module):
    """What the loaded model is given, and what comes out of it."""
    if isinstance(module, CausalLM):
        tokens = torch.randint(3, 200, (2, 24))
        with torch.no_grad():
            return [tokens], module.lm(tokens).logits
    if type(module).__name__ == "UViCModule":
        h = module.hparams
        given = [torch.randn(2, h.channels, h.image_size, h.image_size), torch.tensor([100.0, 900.0])]
        with torch.no_grad():
            return given, module.model(*given)
    return None
