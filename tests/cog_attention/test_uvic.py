"""U-ViC: sizes and placement of the paper's models, and the diffusion around it."""

import pytest
import torch

from tenfold.cog_attention import UViC, UViCModule
from tenfold.cog_attention.diffusion import BETA_MAX, BETA_MIN, signal_level
from tenfold.cog_attention.uvic import time_embedding

CIFAR = {"image_size": 32, "patch_size": 2, "channels": 3, "dim": 512, "depth": 12, "heads": 8}
COCO = {**CIFAR, "channels": 4, "context": (77, 768)}


def blocks(model):
    return [*model.in_blocks, model.mid_block, *model.out_blocks]


@pytest.mark.parametrize("attention", ["cog", "softmax"])
@pytest.mark.parametrize(("sizes", "parameters"), [(CIFAR, 44_255_328), (COCO, 44_692_644)])
def test_paper_models_have_the_parameters_of_u_vit(sizes, parameters, attention):
    """The counts are those of U-ViT's own code with its CIFAR-10 and MS-COCO settings."""
    with torch.device("meta"):
        model = UViC(**sizes, attention=attention)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_first_and_last_block_keep_softmax():
    with torch.device("meta"):
        kinds = [block.attention for block in blocks(UViC(**COCO))]
    assert kinds == ["softmax", *["cog"] * 11, "softmax"]
    assert UViC(**COCO | {"dim": 16, "depth": 2}).extra_tokens == 78


@pytest.mark.parametrize("condition", ["none", "label", "context"])
def test_shapes_and_conditions(condition):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "channels": 3, "dim": 16, "depth": 2, "heads": 2}
    extra = {"none": {}, "label": {"classes": 5}, "context": {"context": (7, 12)}}[condition]
    given = {"none": {}, "label": {"label": torch.tensor([1, 4])}, "context": {"context": torch.randn(2, 7, 12)}}
    model = UViC(**sizes, **extra)
    images, time = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0])
    out = model(images, time, **given[condition])
    assert out.shape == images.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    wrong = given["label" if condition == "none" else "none"]
    with pytest.raises(ValueError, match=r"(label|context): the model was built with"):
        model(images, time, **wrong)


def test_patches_go_back_where_they_came_from():
    """With a decoder that copies, pixel (y, x) of channel c is entry ((y % p)·p + x % p)·C + c of its patch."""
    model = UViC(image_size=4, patch_size=2, channels=2, dim=8, depth=2, heads=1)
    torch.nn.init.dirac_(model.smooth.weight)
    torch.nn.init.zeros_(model.smooth.bias)
    patches = torch.arange(4 * 8.0).view(1, 4, 8)
    model.decode = torch.nn.Identity()
    model.norm = torch.nn.Module()
    model.norm.forward = lambda x: torch.cat([torch.zeros(1, 1, 8), patches], dim=1)
    image = model(torch.zeros(1, 2, 4, 4), torch.zeros(1))
    for y in range(4):
        for x in range(4):
            for c in range(2):
                patch, inside = (y // 2) * 2 + x // 2, ((y % 2) * 2 + x % 2) * 2 + c
                assert image[0, c, y, x] == patches[0, patch, inside]


def test_signal_level_is_the_integral():
    time = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    beta = BETA_MIN + (BETA_MAX - BETA_MIN) * time
    integral = torch.cumulative_trapezoid(beta, time)
    torch.testing.assert_close(signal_level(time[1:]), torch.exp(-integral), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(time_embedding(torch.zeros(1), 6), torch.tensor([[1.0, 1, 1, 0, 0, 0]]))


class Oracle(torch.nn.Module):
    """The exact noise prediction for data that is one known image."""

    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, x, time):
        level = signal_level(time / 1000)[:, None, None, None]
        return (x - level.sqrt() * self.image) / (1 - level).sqrt()


def test_sampling_with_a_perfect_model_gives_the_data():
    module = UViCModule(image_size=8, patch_size=2, dim=8, depth=2, heads=1)
    image = torch.rand(1, 1, 8, 8) * 2 - 1
    module.model = Oracle(image)
    torch.testing.assert_close(module.sample(3, steps=20), image.expand(3, 1, 8, 8), rtol=0, atol=1e-4)
    assert torch.equal(module.sample(2, steps=3, seed=4), module.sample(2, steps=3, seed=4))


def test_validation_uses_the_same_noise_each_time():
    torch.manual_seed(0)
    module = UViCModule(image_size=8, patch_size=2, dim=8, depth=2, heads=1)
    losses = []
    module.log = lambda name, value, **_: losses.append(value.item())
    batch = {"images": torch.rand(16, 1, 8, 8) * 2 - 1}
    module.validation_step(batch, 0)
    torch.rand(5)
    module.validation_step(batch, 0)
    module.validation_step(batch, 1)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 9, "patch_size": 2}, "patch_size: 2 does not divide image_size, 9"),
        ({"dim": 20, "heads": 3}, "heads: 3 does not divide dim, 20"),
        ({"depth": 3}, "depth: must be even and at least 2, got 3"),
        ({"attention": "cogg"}, "attention: must be 'cog' or 'softmax', got 'cogg'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        UViC(**arguments)
