"""MNIST (LeCun, Cortes and Burges, 1998), read from the `mnist.npz` beside this file."""

import functools
import math
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).resolve().with_name("mnist.npz")
MAX_SHIFT = 0.05 * 32  # pixels: 5% of an image that is padded by 2 on each side


class DataError(Exception):
    """A one-line message about data that the user can put right."""


class Loader:
    """Batches of one split, on its images' device; every iteration is an epoch.

    Args:
        images: uint8 `[N, 784]`, not to be written to.
        labels: int64 `[N]`.
        shuffle: draw a new order for each epoch, from PyTorch's own generator.
        drop_last: leave out the last batch if it is smaller than `batch_size`.

    Yields `(images, labels)`: floats `[batch, 784]` of pixels in 0..255, and int64 `[batch]`.
    Raises DataError if `drop_last` leaves no batch.
    """

    def __init__(self, images, labels, batch_size, shuffle=False, drop_last=False):
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        if len(self) == 0:
            raise DataError(f"batch size {batch_size} makes no batch of {len(images)} images")

    def __len__(self):
        n_batches = len(self.images) / self.batch_size
        return math.floor(n_batches) if self.drop_last else math.ceil(n_batches)

    def __iter__(self):
        order = torch.randperm if self.shuffle else torch.arange
        rows = order(len(self.images), device=self.images.device)
        for batch in rows[: len(self) * self.batch_size].split(self.batch_size):
            yield self.batch(batch)

    def batch(self, rows):
        """Returns what the loader yields for these rows, an int64 `[batch]`."""
        return self.images[rows].to(torch.get_default_dtype()), self.labels[rows]


class ShiftedLoader(Loader):
    """A Loader that moves each image by up to two pixels, anew in every epoch.

    As the assignment's torchvision transforms do it: the edge pixels are repeated twice on each
    side, and RandomAffine(0, translate=(0.05, 0.05)) moves what is now 32 pixels wide by
    round(U(-1.6, 1.6)) along either axis: by -2, -1, 0, 1, 2 with shares 1, 10, 10, 10, 1 of 32.
    The 28 pixels in the middle are kept.
    """

    def batch(self, rows):
        images, labels = super().batch(rows)
        shifts = torch.empty(2, len(images), 1, device=images.device)
        down, right = shifts.uniform_(-MAX_SHIFT, MAX_SHIFT).round().long()
        # Each pixel comes from `down` rows above and `right` columns to the left; beyond the edge
        # the nearest pixel stands.
        position = torch.arange(28, device=images.device)
        row, column = (position - down).clamp(0, 27), (position - right).clamp(0, 27)
        pixels = (28 * row[:, :, None] + column[:, None, :]).flatten(1)
        return images.gather(1, pixels), labels


def mnist(
    root="./data/", batch_size=128, download=True, *,
    n_train=40_000, shift=True, drop_last=False, device="cpu",
):  # fmt: skip
    """Returns the training, validation and test Loader of MNIST in grey values 0..255.

    Args:
        root, download: the template's, without effect, because the data come with the repository.
        n_train: train on the first `n_train` images, 50,000 at most; validate on the next 10,000.
        shift: shift the training images at random (ShiftedLoader).
        drop_last: leave out the last training batch if it is not full.

    Raises DataError for a missing or damaged file and a `batch_size` that makes no batch.
    """
    images, labels = (tensor.to(device) for tensor in load())
    train, val, test = slice(n_train), slice(n_train, n_train + 10_000), slice(60_000, 70_000)
    kind = ShiftedLoader if shift else Loader
    return (
        kind(images[train], labels[train], batch_size, shuffle=True, drop_last=drop_last),
        Loader(images[val], labels[val], batch_size),
        Loader(images[test], labels[test], batch_size),
    )


@functools.cache
def load():
    """Returns the images of the training and then the test file, uint8 `[70000, 784]`, and labels.

    The labels are int64 `[70000]`. Raises DataError if the file is missing or damaged.
    """
    arrays = read(FILE)
    images = np.concatenate([arrays["train_images"], arrays["test_images"]]).reshape(-1, 784)
    labels = np.concatenate([arrays["train_labels"], arrays["test_labels"]])
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def read(path):
    """Returns the arrays of a npz file by name; its own checksums find damage.

    Raises DataError if the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            return dict(archive)
    except Exception as error:  # a damaged archive fails in a dozen ways, with one remedy
        message = f"{path} is missing or damaged; datasets/README.md says where to get it"
        raise DataError(message) from error
