"""Tests of datasets/: the files, the splits, the loaders, the bits and every DataError."""

import collections
import hashlib
import itertools
import re
import struct

import numpy as np
import pytest
import scipy.stats
import torch
from torchvision import transforms
from torchvision.transforms import functional

from datasets import bmnist as bmnist_module
from datasets import mnist as mnist_module
from datasets.bmnist import bmnist
from datasets.mnist import DataError, Loader, load, mnist

NPZ = mnist_module.FILE


@pytest.fixture(scope="module")
def arrays():
    with np.load(NPZ) as archive:
        return {name: archive[name] for name in archive.files}


def error_of(function, *args, **kwargs):
    """Return the message of the DataError that the call must raise, which must be one line."""
    with pytest.raises(DataError) as info:
        function(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


def epoch(loader):
    """Return the batches of one epoch, joined."""
    batches = list(loader)
    if isinstance(batches[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return torch.cat(batches)


# ------------------------ The file ------------------------
def test_arrays_make_the_published_idx_files(arrays):
    published = {
        "train_images": (2051, "6bbc9ace898e44ae57da46a324031adb"),
        "train_labels": (2049, "a25bea736e30d166cdddb491f175f624"),
        "test_images": (2051, "2646ac647ad5339dbf082846283269ea"),
        "test_labels": (2049, "27ae3e4e09519cfbb04c329615203637"),
    }
    for name, (magic, md5) in published.items():
        header = struct.pack(f">{1 + arrays[name].ndim}i", magic, *arrays[name].shape)
        assert hashlib.md5(header + arrays[name].tobytes()).hexdigest() == md5
    images, labels = load()
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    for split, rows in (("train", slice(60_000)), ("test", slice(60_000, None))):
        assert np.array_equal(images[rows], arrays[f"{split}_images"].reshape(-1, 784))
        assert np.array_equal(labels[rows], arrays[f"{split}_labels"])


DAMAGES = [
    (lambda _: None, "No such file"),
    (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "no npz archive"),
    (lambda _: NPZ.read_bytes()[:1_000_000], ""),
    (lambda _: {"train_images": np.zeros(3)}, "train_labels"),
    (lambda a: {**a, "train_labels": np.int64(a["train_labels"])}, "train_labels has the wrong"),
    (lambda a: {**a, "test_images": a["test_images"] ^ 1}, "test_images has the wrong SHA-256"),
]


@pytest.mark.parametrize(("damage", "what"), DAMAGES)
def test_missing_or_damaged_file(file, arrays, damage, what):
    content = damage(arrays)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        np.savez(file, **content)
    for make in (mnist, bmnist):
        message = error_of(make)
        assert message.startswith(f"{file}: ")
        assert re.search(what, message)
        assert "datasets/README.md" in message
        assert "allow_pickle" not in message


def test_missing_or_damaged_bits(tmp_path, monkeypatch):
    path = tmp_path / "binarized_mnist.npz"
    monkeypatch.setattr(bmnist_module, "FILE", path)
    monkeypatch.setattr(bmnist_module, "load", bmnist_module.load.__wrapped__)
    assert "No such file" in error_of(bmnist)
    np.savez(path, bits=np.zeros((70_000, 98), dtype=np.uint8), rows=np.zeros(70_000, np.int32))
    message = error_of(bmnist)
    assert message.startswith(f"{path}: bits has the wrong SHA-256")


# ------------------------ Grey MNIST ------------------------
@pytest.mark.parametrize("options", [{}, {"n_train": 50_000, "shift": False}])
def test_mnist_splits(options):
    """Validation and test images in order, neither shifted nor scaled."""
    (images, labels), n = load(), options.get("n_train", 40_000)
    loaders = mnist("the template's root", **options)
    splits = slice(n), slice(n, n + 10_000), slice(60_000, None)
    for loader, rows in zip(loaders, splits, strict=True):
        assert torch.equal(loader.images, images[rows])
        assert torch.equal(loader.labels, labels[rows])
    for loader in loaders[1:]:
        seen, seen_labels = epoch(loader)
        assert torch.equal(seen, loader.images.float())
        assert torch.equal(seen_labels, loader.labels)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_mnist_batches(shift, drop_last):
    """Every training image once in an epoch, in random order, in grey values 0..255."""
    train, _, _ = mnist(batch_size=300, shift=shift, drop_last=drop_last)
    assert train.labels.dtype == torch.int64
    train.labels = torch.arange(40_000)
    batches = list(train)
    sizes = [300] * 133 + [100] * (not drop_last)
    assert [len(images) for images, _ in batches] == sizes
    assert len(train) == len(sizes)
    pixels, rows = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (pixels.shape, pixels.dtype) == ((len(rows), 784), torch.float32)
    assert len(rows.unique()) == len(rows)
    assert not torch.equal(rows[:300], torch.arange(300))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert torch.equal(pixels, train.images[rows].float()) == (not shift)


def test_shifts_are_those_of_torchvisions_transforms():
    """Every shift as in the template's own pipeline, and as often as it draws them."""
    pad, crop = transforms.Pad(2, padding_mode="edge"), transforms.CenterCrop(28)
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)  # no symmetry, no plain edge
    pictures, steps = map(functional.to_pil_image, images), range(-2, 3)
    shift_of = {}
    for (i, picture), right, down in itertools.product(enumerate(pictures), steps, steps):
        moved = crop(functional.affine(pad(picture), 0, [right, down], 1, [0]))
        shift_of[i, np.asarray(moved).tobytes()] = down, right
    assert len(shift_of) == 20 * 25

    n = 10_000
    repeated = images.flatten(1).repeat(n // 20, 1)
    loader = mnist_module.ShiftedLoader(repeated, torch.arange(n), 128, shuffle=True)
    seen, rows = epoch(loader)
    shown = zip(rows.tolist(), seen.byte().numpy(), strict=True)
    counts = collections.Counter(shift_of[row % 20, x.tobytes()] for row, x in shown)
    shares = np.outer(*2 * [np.array([1, 10, 10, 10, 1]) / 32])  # of round(U(-1.6, 1.6))
    found = [counts[down_and_right] for down_and_right in itertools.product(steps, steps)]
    assert scipy.stats.chisquare(found, n * shares.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("make", [mnist, bmnist])
def test_every_epoch_is_another(make):
    loader, _, _ = make(batch_size=50)
    first, second = (next(iter(loader))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_impossible_options():
    for n_train in (0, 50_001):
        assert str(n_train) in error_of(mnist, n_train=n_train)
    for make in (mnist, bmnist):
        assert "batch size 0 " in error_of(make, batch_size=0)
    message = error_of(bmnist, binarization="grey")
    assert all(word in message for word in ("'grey'", "static", "dynamic"))
    images, labels = torch.zeros(5, 784, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    assert [len(x) for x, _ in Loader(images, labels, 6)] == [5]
    assert "batch size 6" in error_of(Loader, images, labels, 6, drop_last=True)


# ------------------------ Binary MNIST ------------------------
@pytest.fixture(scope="module")
def static():
    return bmnist()


def assert_drawn_from(binary, grey):
    """Check the number of ones for every grey value against its binomial distribution."""
    counts = np.bincount(grey.flatten(), minlength=256)
    ones = np.bincount(grey.flatten(), weights=binary.flatten(), minlength=256)
    p = np.arange(256) / 255
    assert ones[0] == 0
    assert ones[255] == counts[255] > 0
    z = (ones - counts * p)[1:255] / np.sqrt(counts * p * (1 - p))[1:255]
    assert abs(z).max() < 5
    assert 0.6 < (z**2).mean() < 1.5


def test_static_bits_make_larochelles_published_files(static):
    """784 digits a line, a blank between two; batches are floats, in order but for training."""
    published = [  # as TensorFlow Datasets lists them
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    ]
    for loader, sha256 in zip(static, published, strict=True):
        assert loader.images.dtype == torch.uint8
        text = np.full((len(loader.images), 2 * 784), ord(" "), dtype=np.uint8)
        text[:, ::2] = ord("0") + loader.images.numpy()
        text[:, -1] = ord("\n")
        assert hashlib.sha256(text).hexdigest() == sha256
    batch = next(iter(static[0]))
    assert (batch.shape, batch.dtype) == ((128, 1, 28, 28), torch.float32)
    for loader in static[1:]:
        assert torch.equal(epoch(loader).flatten(1), loader.images.float())


def test_rows_are_one_to_one_and_no_bit_contradicts_its_grey_value(static):
    (grey, labels), (_, rows) = load(), bmnist_module.load()
    for part, n in ((rows[:60_000], 0), (rows[60_000:], 60_000)):
        assert torch.equal(part.sort()[0], torch.arange(n, n + len(part)))
    for loader, part in zip(static, rows.split([50_000, 10_000, 10_000]), strict=True):
        assert_drawn_from(loader.images.numpy(), grey[part].numpy())
        assert torch.equal(loader.labels, labels[part])


def test_dynamic(static):
    train, val, test = bmnist(binarization="dynamic")
    grey = load()[0][bmnist_module.load()[1][:50_000]]
    assert torch.equal(train.images, grey)
    assert torch.equal(train.labels, static[0].labels)
    rows = slice(10_000)
    first, second = train.batch(rows), train.batch(rows)
    assert (first.shape, first.dtype) == ((10_000, 1, 28, 28), torch.float32)
    assert not torch.equal(first, second)
    for binary in (first, second):
        assert_drawn_from(binary.numpy(), grey[rows].numpy())
    for loader, fixed in [(val, static[1]), (test, static[2])]:
        assert torch.equal(epoch(loader), epoch(fixed))
