"""The digits of scikit-learn as a tree of image files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from .images import DataError


def cache_dir() -> Path:
    """Where ``digits`` is written when no --data-dir is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttricks"


def digits_folder(data_dir: Path | None = None) -> Path:
    """The 1,797 scanned digits of scikit-learn (8x8 pixels, 17 grey levels; Alpaydin and Kaynak 1998, UCI) as PNG files
    in an ImageFolder tree, written on the first call: a stratified fifth, drawn with a fixed seed, is val/.

    Returns:
        DATA_DIR/digits, or the same under the user's cache directory.
    """
    root = (data_dir or cache_dir()) / "digits"
    if root.is_dir():
        return root
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("--data digits needs scikit-learn: pip install 'fasttricks[train]'") from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
    root.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed: a folder of the final name is complete.
    draft = Path(tempfile.mkdtemp(prefix=".digits-", dir=root.parent))
    try:
        draft.chmod(0o755)
        for part, indices in (("train", train), ("val", val)):
            for i in sorted(indices):
                folder = draft / part / str(digits.target[i])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[i]).save(folder / f"{i:04d}.png")
        try:
            draft.rename(root)
        except OSError:
            if not root.is_dir():  # another process was first: its folder is as good
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root
