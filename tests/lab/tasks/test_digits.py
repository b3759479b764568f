import gzip
import struct

import numpy as np
import pytest
import torch

from sparkjoy_lab.tasks.digits import load_digits


def write_folder(folder, compress, train=20, test=5):
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        images = (
            struct.pack(">HBBIII", 0, 8, 3, count, 28, 28) + random.integers(0, 256, count * 784, np.uint8).tobytes()
        )
        labels = struct.pack(">HBBI", 0, 8, 1, count) + (np.arange(count) % 10).astype(np.uint8).tobytes()
        for name, raw in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            path = folder / (name + (".gz" if compress else ""))
            path.write_bytes(gzip.compress(raw) if compress else raw)


def test_embedded_is_a_fixed_stratified_split():
    digits = load_digits("embedded")
    assert digits.train_images.shape == (4000, 784)
    assert digits.test_images.shape == (1000, 784)
    assert digits.test_labels.bincount().tolist() == [100] * 10
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert torch.equal(digits.train_images, load_digits("embedded").train_images)


@pytest.mark.parametrize("compress", [True, False])
def test_a_folder_of_idx_files(tmp_path, compress):
    write_folder(tmp_path, compress)
    digits = load_digits(str(tmp_path))
    assert digits.train_images.shape == (20, 784)
    assert digits.train_images.dtype == torch.uint8
    assert digits.test_labels.tolist() == [0, 1, 2, 3, 4]


def test_the_full_set(full_mnist):
    digits = load_digits(str(full_mnist))
    assert (len(digits.train_labels), len(digits.test_labels)) == (60_000, 10_000)
    assert digits.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert digits.train_images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


def damage_missing(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()


def damage_truncated(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-10])


def damage_gzip(folder):
    path = folder / "train-images-idx3-ubyte"
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(path.read_bytes())[:-100])


def damage_magic(folder):
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(b"hello, this is no IDX file")


def damage_empty(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(b"")


def damage_longer(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes() + b"\x00")


def damage_dimensions(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBB", 0, 8, 255) + bytes(2000))


def damage_sizes(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">HBBIII", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + path.read_bytes()[16:])


def damage_labels(folder):
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "no t10k-labels-idx1-ubyte"),
        (damage_truncated, "train-images-idx3-ubyte is not a whole IDX file"),
        (damage_gzip, r"train-images-idx3-ubyte.gz is not a whole IDX file"),
        (damage_magic, "train-labels-idx1-ubyte is not a whole IDX file"),
        (damage_empty, "train-labels-idx1-ubyte is not a whole IDX file"),
        (damage_longer, "more values for the shape"),
        (damage_dimensions, "train-labels-idx1-ubyte is not a whole IDX file"),
        (damage_sizes, "expected 1 to 1,000,000 images of 28 by 28"),
        (damage_labels, "labels 0 to 9"),
    ],
)
def test_a_corrupt_folder_is_named(tmp_path, damage, message):
    write_folder(tmp_path, compress=False)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_digits(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_digits(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("count", [20, 2**32 - 1])
def test_a_file_that_expands_beyond_its_header_is_not_read_to_the_end(tmp_path, monkeypatch, count):
    write_folder(tmp_path, compress=False)
    header = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + bytes(50_000_000))
    taken = []
    read = gzip._GzipReader.read

    def counted(reader, size=-1):
        taken.append(len(got := read(reader, size)))
        return got

    monkeypatch.setattr(gzip._GzipReader, "read", counted)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is not a whole IDX file"):
        load_digits(str(tmp_path))
    assert sum(taken) < 1_000_000


def test_a_folder_may_be_below_home(tmp_path, monkeypatch):
    write_folder(tmp_path, compress=True)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert len(load_digits(f"~/{tmp_path.name}").train_labels) == 20
