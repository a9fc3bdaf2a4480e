"""The data: the published files, the splits, the order, the shifts, the binary draws."""

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


def epoch(loader):
    """Returns the images of one epoch, joined, and their labels."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


# ------------------------ The files ------------------------
def test_grey_arrays_make_the_published_idx_files():
    images, labels = load()
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    images, labels = images.view(-1, 28, 28).split([60_000, 10_000]), labels.split([60_000, 10_000])
    for array, magic, md5 in (
        (images[0], 2051, "6bbc9ace898e44ae57da46a324031adb"),
        (labels[0].byte(), 2049, "a25bea736e30d166cdddb491f175f624"),
        (images[1], 2051, "2646ac647ad5339dbf082846283269ea"),
        (labels[1].byte(), 2049, "27ae3e4e09519cfbb04c329615203637"),
    ):
        header = struct.pack(f">{1 + array.ndim}i", magic, *array.shape)
        assert hashlib.md5(header + array.numpy().tobytes()).hexdigest() == md5


def test_binary_images_make_larochelles_published_files():
    """They are text: 784 digits a line, with a blank between two."""
    published = [  # as TensorFlow Datasets lists them
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    ]
    for loader, sha256 in zip(bmnist("the template's root"), published, strict=True):
        text = np.full((len(loader.images), 2 * 784), ord(" "), dtype=np.uint8)
        text[:, ::2] = ord("0") + loader.images.numpy()
        text[:, -1] = ord("\n")
        assert hashlib.sha256(text).hexdigest() == sha256


@pytest.mark.parametrize("module", [mnist_module, bmnist_module])
def test_a_missing_or_damaged_file_is_a_line_about_it(module, tmp_path, monkeypatch):
    path, flipped = tmp_path / "some.npz", bytearray(module.FILE.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    monkeypatch.setattr(module, "FILE", path)
    monkeypatch.setattr(module, "load", module.load.__wrapped__)  # without its cache
    for content in (None, b"version https://git-lfs.github.com/spec/v1\n", flipped):
        if content is not None:
            path.write_bytes(content)
        line = re.escape(f"{path} is missing or damaged; datasets/README.md says where to get it")
        with pytest.raises(DataError, match=rf"^{line}\Z"):
            bmnist()


# ------------------------ Splits and batches ------------------------
@pytest.mark.parametrize("n_train", [40_000, 50_000])
def test_mnist_is_split_in_order_and_only_training_images_are_shifted(n_train):
    images, labels = load()
    splits = slice(n_train), slice(n_train, n_train + 10_000), slice(60_000, None)
    loaders = mnist("the template's root", n_train=n_train)
    for loader, rows in zip(loaders, splits, strict=True):
        assert torch.equal(loader.images, images[rows])
        assert torch.equal(loader.labels, labels[rows])
    for loader in loaders[1:]:
        torch.testing.assert_close(epoch(loader), (loader.images.float(), loader.labels))


@pytest.mark.parametrize(("shift", "drop_last"), [(True, False), (False, True)])
def test_an_epoch_has_every_training_image_once_in_a_new_order(shift, drop_last):
    train, _, _ = mnist(batch_size=300, shift=shift, drop_last=drop_last)
    train.labels = torch.arange(40_000)  # so that a label is the number of its image
    sizes = [len(images) for images, _ in train]
    assert sizes == [300] * 133 + [100] * (not drop_last)
    assert len(train) == len(sizes)
    (pixels, rows), (_, other_rows) = epoch(train), epoch(train)
    assert (pixels.shape, pixels.dtype) == ((sum(sizes), 784), torch.float32)
    assert len(rows.unique()) == len(rows)
    assert scipy.stats.spearmanr(rows, range(len(rows))).pvalue > 1e-3
    assert not torch.equal(rows, other_rows)
    assert torch.equal(pixels, train.images[rows].float()) == (not shift)


def test_fewer_images_than_one_full_batch_are_refused():
    with pytest.raises(DataError, match="batch size 6 makes no batch of 5 images"):
        Loader(torch.zeros(5, 784), torch.zeros(5), 6, drop_last=True)


def test_shifts_are_those_of_torchvisions_transforms():
    """Every shift is as in the template's own pipeline, and as often as it draws them."""
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
    seen, rows = epoch(mnist_module.ShiftedLoader(repeated, torch.arange(n), 128, shuffle=True))
    shown = zip(rows.tolist(), seen.byte().numpy(), strict=True)
    counts = collections.Counter(shift_of[row % 20, x.tobytes()] for row, x in shown)
    shares = np.outer(*2 * [np.array([1, 10, 10, 10, 1]) / 32])  # of round(U(-1.6, 1.6))
    found = [counts[down_and_right] for down_and_right in itertools.product(steps, steps)]
    assert scipy.stats.chisquare(found, n * shares.ravel()).pvalue > 1e-3


# ------------------------ Binary draws ------------------------
def assert_drawn_from(binary, grey):
    """Checks the number of ones for every grey value against its binomial distribution."""
    counts = np.bincount(grey.flatten(), minlength=256)
    ones = np.bincount(grey.flatten(), weights=binary.flatten(), minlength=256)
    p = np.arange(256) / 255
    assert ones[0] == 0
    assert ones[255] == counts[255] > 0
    z = (ones - counts * p)[1:255] / np.sqrt(counts * p * (1 - p))[1:255]
    assert abs(z).max() < 5
    assert 0.6 < (z**2).mean() < 1.5


def test_each_binary_image_is_a_draw_of_the_grey_one_whose_label_it_has():
    (grey, labels), (_, rows) = load(), bmnist_module.load()
    for part, n in ((rows[:60_000], 0), (rows[60_000:], 60_000)):
        assert torch.equal(part.sort()[0], torch.arange(n, n + len(part)))
    loaders = bmnist(batch_size=100)
    for loader, part in zip(loaders, rows.split([50_000, 10_000, 10_000]), strict=True):
        assert_drawn_from(loader.images.numpy(), grey[part].numpy())
        assert torch.equal(loader.labels, labels[part])
    for loader in loaders[1:]:
        assert torch.equal(torch.cat(list(loader)).flatten(1), loader.images.float())
    first, second = (next(iter(loaders[0])) for _ in range(2))
    assert (first.shape, first.dtype) == ((100, 1, 28, 28), torch.float32)
    assert not torch.equal(first, second)  # another order


def test_dynamic_training_images_are_new_draws_in_every_epoch():
    static, dynamic = bmnist(), bmnist(binarization="dynamic")
    grey = load()[0][bmnist_module.load()[1][:50_000]]
    assert torch.equal(dynamic[0].images, grey)
    assert torch.equal(dynamic[0].labels, static[0].labels)
    rows = torch.arange(10_000)
    first, second = dynamic[0].batch(rows), dynamic[0].batch(rows)
    assert not torch.equal(first, second)
    for binary in (first, second):
        assert_drawn_from(binary.numpy(), grey[rows].numpy())
    for loader, fixed in zip(dynamic[1:], static[1:], strict=True):
        assert torch.equal(torch.cat(list(loader)), torch.cat(list(fixed)))
