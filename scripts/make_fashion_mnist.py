"""Make packages/core's Fashion-MNIST from Debian's package: the test set's two IDX files, compressed harder.

    apt-get download dataset-fashion-mnist
    dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
    python scripts/make_fashion_mnist.py unpacked/usr/share/datasets/fashion-mnist

The uncompressed files are kept byte for byte.
"""

import argparse
import gzip
import hashlib
import json
import lzma
from pathlib import Path

SOURCES = {
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FOLDER = Path(__file__).parent.parent / "packages/core/src/tenfold/core/data/fashion-mnist"


def main() -> None:
    """Read the source, check it, write data and manifest."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder

    FOLDER.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, expected in SOURCES.items():
        content = gzip.decompress((folder / f"{name}.gz").read_bytes())
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise SystemExit(f"{folder / name}.gz: expected sha256 {expected} of the content, found {found}")
        packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
        (FOLDER / f"{name}.xz").write_bytes(packed)
        files[f"{name}.xz"] = {
            "sha256": hashlib.sha256(packed).hexdigest(),
            "unpacked_sha256": expected,
        }
    manifest = {
        "title": "Fashion-MNIST: the 10,000 labelled images of its test set, 28×28 gray, 10 classes",
        "licence": "MIT",
        "source": {"package": "Debian dataset-fashion-mnist 0.0~git20200523.55506a9-1"},
        "made_by": f"scripts/{Path(__file__).name}",
        "files": files,
    }
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
