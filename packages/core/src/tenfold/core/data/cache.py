"""Where computed data are kept."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The environment variable `TENFOLD_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("TENFOLD_CACHE") or platformdirs.user_cache_dir("tenfold"))
