"""Larochelle's Binary MNIST, read from the `binarized_mnist.npz` beside this file.

Larochelle and Murray, The neural autoregressive distribution estimator, AISTATS 2011; first drawn
by Salakhutdinov and Murray, On the quantitative analysis of deep belief networks, ICML 2008.
"""

import functools

import numpy as np
import torch

from datasets import mnist
from datasets.mnist import DataError, Loader, take

FILE = mnist.FILE.with_name("binarized_mnist.npz")
SHA256 = {  # of the bytes of each array
    "bits": "c462f82a020638a4d5d8d44e4c83242ee0145ee1d125869d0e030c35011837e6",
    "rows": "f379115fac4f7f57796eb33d650ed415e79531c2bb1241da1b21b2bf73dd4c63",
}
SIZES = [50_000, 10_000, 10_000]


class BinaryLoader(Loader):
    """A Loader that yields the images alone: float32 `[batch, 1, 28, 28]` in {0, 1}.

    With `dynamic=True` its `images` are grey, and every pixel that it yields is drawn from
    Bernoulli(grey / 255).
    """

    def __init__(self, *args, dynamic=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.dynamic = dynamic

    def batch(self, rows):
        images = take(self.images, rows)
        if self.dynamic:
            # A byte of 0..254 is < grey with probability grey/255.
            images = torch.empty_like(images).random_(0, 255) < images
        return images.view(-1, 1, 28, 28).float()


def bmnist(root="./data/", batch_size=128, download=True, *, binarization="static", device="cpu"):
    """Returns the training, validation and test BinaryLoader, of 50,000, 10,000 and 10,000 images.

    Args:
        root, download: the template's, without effect, because the data come with the repository.
        binarization: "static": the images of Larochelle's three files; `images` has them in the
            files' order. "dynamic": the training images drawn anew whenever they are used, from
            the grey images that Larochelle's were drawn from (Burda et al., 2016,
            arXiv:1509.00519); the others static.

    The loaders' `labels` are those of the grey images. Raises DataError for a missing or damaged
    file, another `binarization` or a bad `batch_size`.
    """
    if binarization not in ("static", "dynamic"):
        raise DataError(f"binarization {binarization!r} is not static or dynamic")
    dynamic = binarization == "dynamic"
    grey, labels = mnist.load()
    images, rows = load()
    images = list(images.to(device).split(SIZES))
    labels = labels[rows].to(device).split(SIZES)
    if dynamic:
        images[0] = grey[rows[: SIZES[0]]].to(device)
    return (
        BinaryLoader(images[0], labels[0], batch_size, shuffle=True, dynamic=dynamic),
        BinaryLoader(images[1], labels[1], batch_size),
        BinaryLoader(images[2], labels[2], batch_size),
    )


@functools.cache
def load():
    """Returns Larochelle's training, validation and test images, uint8 `[70000, 784]` in {0, 1}.

    Also returns, for each, the row of its grey image in `mnist.load`, int64 `[70000]`. Raises
    DataError if the file is missing or damaged.
    """
    arrays = mnist.read(FILE, SHA256)
    images = np.unpackbits(arrays["bits"], axis=1)
    return torch.from_numpy(images), torch.from_numpy(arrays["rows"]).long()
