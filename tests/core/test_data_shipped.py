"""The data that ship with the package are what their manifests say, and their loaders read them."""

import bz2
import hashlib
import importlib.util
import json
import lzma
from pathlib import Path

import pytest
import torch

import tenfold.core.data
from tenfold.core.data.corpus import Corpus
from tenfold.core.data.images import FashionMNISTDataModule, read_fashion_mnist

FOLDER = Path(tenfold.core.data.__file__).parent
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(("name", "unpack"), [("wikipedia-leads", bz2.open), ("fashion-mnist", lzma.open)])
def test_files_equal_their_manifest(name, unpack):
    manifest = json.loads((FOLDER / name / "manifest.json").read_text())
    assert manifest["files"]
    for file, entry in manifest["files"].items():
        path = FOLDER / name / file
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        with unpack(path) as stream:
            assert hashlib.sha256(stream.read()).hexdigest() == entry["unpacked_sha256"]


def test_articles_are_counted_and_carry_their_titles():
    folder = FOLDER / "wikipedia-leads"
    with bz2.open(folder / "articles.jsonl.bz2", "rt", encoding="utf-8") as stream:
        articles = [json.loads(line) for line in stream]
    counts = json.loads((folder / "manifest.json").read_text())["files"]["articles.jsonl.bz2"]
    assert len({a["title"] for a in articles}) == len(articles) == counts["articles"]
    assert sum(len(a["text"]) for a in articles) == counts["characters"]

    documents = [d for split in ("train", "val") for d in Corpus().documents(split)]
    assert sorted(documents) == sorted(f"{a['title']}\n{a['text']}" for a in articles)


def test_each_data_set_ships_its_licence():
    assert "creativecommons.org/licenses/by-sa/4.0" in (FOLDER / "wikipedia-leads" / "LICENSE.md").read_text()
    assert "Attribution-ShareAlike 4.0" in (FOLDER / "wikipedia-leads" / "CC-BY-SA-4.0.txt").read_text()
    assert "Copyright © 2017 Zalando SE" in (FOLDER / "fashion-mnist" / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("The viola ( vee-OH-lə, Italian: [v])", "The viola (vee-OH-lə, Italian: [v])"),
        ("A chair ( ) is\u00a0a seat , typically .", "A chair is a seat, typically."),
        ("the Republic (509\u200d–\u200d27\u00a0BC)", "the Republic (509–27 BC)"),
        ('Poet". \nThe  story', 'Poet".\nThe story'),
        ("Agne\u0300s \u2060in .NET", "Agnès in .NET"),
    ],
)
def test_cleaning_removes_the_traces_of_markup(raw, cleaned):
    spec = importlib.util.spec_from_file_location("make_wikipedia_leads", SCRIPTS / "make_wikipedia_leads.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.clean(raw) == cleaned
    assert script.clean(cleaned) == cleaned


def test_fashion_mnist_has_its_published_shape():
    images, labels = read_fashion_mnist()
    assert images.shape == (10_000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10
    # The first image is an ankle boot: the sole fills the lower rows, the upper rows are background.
    assert labels[0] == 9
    assert images[0, 0, :7].max() == 0
    assert images[0, 0, 20, 1:27].min() > 0


def test_fashion_mnist_splits_without_overlap():
    data = FashionMNISTDataModule(batch_size=250, val_images=500)
    data.setup()
    images, labels = read_fashion_mnist()
    assert torch.equal(torch.cat([data.train.images, data.val.images]), images)
    batches = list(data.val_dataloader())
    assert len(batches) == 2
    assert torch.equal(torch.cat([b["labels"] for b in batches]), labels[-500:])
    restored = (torch.cat([b["images"] for b in batches]) + 1) * 127.5
    assert torch.allclose(restored, images[-500:].float(), atol=1e-4)


def test_fashion_mnist_order_follows_the_seed():
    def labels(seed):
        data = FashionMNISTDataModule(batch_size=900, seed=seed)
        data.setup()
        return torch.cat([batch["labels"] for batch in data.train_dataloader()])

    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0), labels(1))
    assert labels(0).bincount().sum() == 9000


@pytest.mark.parametrize("arguments", [{"val_images": 0}, {"val_images": 10_000}, {"batch_size": 0}])
def test_fashion_mnist_refuses_an_empty_split(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        FashionMNISTDataModule(**arguments)
