"""Real pictures out of the scikit-image wheel (mostly CC0); only the file is fetched, once, into the user's cache."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from hayate.checkpoint.packages import download_wheel, extract_member
from hayate.checkpoint.smollm2 import cache_home

# The last release for Python 3.10 carries the same files.
PACKAGE = "scikit-image==0.26.0" if sys.version_info >= (3, 11) else "scikit-image==0.25.2"
SHA256 = {
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",  # a cat, 451x300
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",  # 600x400
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",  # 1000x872
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",  # 1411x1411
    "logo.png": "f2c57fe8af089f08b5ba523d95573c26e62904ac5967f4c8851b27d033690168",  # RGBA, 500x500
    "page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",  # gray, 384x191
}


def photograph(name: str) -> Path:
    """The file of a picture of `SHA256`."""
    folder = cache_home() / "photographs"
    if not folder.is_dir():
        work = folder.with_name(".photographs.partial")
        shutil.rmtree(work, ignore_errors=True)
        try:
            what = "photographs for the tests"
            wheel = download_wheel(PACKAGE, work / "wheel", what=what, progress=False)
            (work / "files").mkdir()
            for member, sha256 in SHA256.items():
                target = work / "files" / member
                extract_member(wheel, f"skimage/data/{member}", target, sha256=sha256, what=what)
            (work / "files").rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder / name
