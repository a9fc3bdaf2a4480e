"""Tests of datasets/: the splits, the loaders, the binarizations and every DataError."""

import collections
import hashlib
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


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Let the modules read the file at this path, which is not there yet."""
    path, read = tmp_path / "mnist.npz", load.__wrapped__  # not from its cache
    monkeypatch.setattr(mnist_module, "FILE", path)
    for module in (mnist_module, bmnist_module):
        monkeypatch.setattr(module, "load", read)
    return path


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


def test_file_is_found_from_any_folder_and_read_once(tmp_path, monkeypatch):
    """The template's `root` has no effect."""
    monkeypatch.chdir(tmp_path)
    images, labels = load()
    assert (images.shape, images.dtype) == ((70_000, 784), torch.uint8)
    assert (labels.shape, labels.dtype) == ((70_000,), torch.int64)
    assert mnist("no such folder")[0].images.data_ptr() == images.data_ptr()
    assert len(bmnist("no such folder", 100)[2]) == 100
    assert list(tmp_path.iterdir()) == []


def save(**changes):
    """Return a damage: the archive with other arrays, or without one."""

    def damage(path, arrays):
        changed = {name: changes.get(name, lambda a: a)(array) for name, array in arrays.items()}
        np.savez(path, **{name: array for name, array in changed.items() if array is not None})

    return damage


def other_byte(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def other_pixel(images):
    content = other_byte(images.tobytes(), 100_000)
    return np.frombuffer(content, dtype=np.uint8).reshape(images.shape)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11490559\n"
DAMAGES = [
    *((lambda path, _, content=content: path.write_bytes(content), "")
      for content in (b"", LFS, b"<!DOCTYPE html>\n<title>404</title>\n", NPZ.read_bytes()[:10**6],
                      other_byte(NPZ.read_bytes(), 5_000_000))),
    (lambda *_: None, "No such file"),
    (save(test_labels=lambda a: None), "test_labels"),
    (save(train_labels=np.int64), r"train_labels is int64 \(60000,\), not uint8"),
    (save(test_images=lambda a: a[:, 0]), r"test_images is uint8 \(10000, 28\), not uint8"),
    (save(test_images=other_pixel), "test_images has the wrong SHA-256"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "what"), DAMAGES)
def test_missing_or_damaged_file(file, arrays, damage, what):
    damage(file, arrays)
    for make in (mnist, bmnist):
        message = error_of(make)
        assert message.startswith(f"{file}: ")
        assert re.search(what, message)
        assert "datasets/README.md" in message
        assert "allow_pickle" not in message


# ------------------------ Grey MNIST ------------------------
@pytest.mark.parametrize("options", [{}, {"n_train": 50_000, "shift": False}])
def test_mnist_splits(arrays, options):
    """Validation and test images in order, neither shifted nor scaled."""
    n = options.get("n_train", 40_000)
    train, val, test = mnist(**options)
    flat = {name: torch.from_numpy(array) for name, array in arrays.items()}
    images, labels = flat["train_images"].flatten(1), flat["train_labels"].long()
    assert torch.equal(train.images, images[:n])
    assert torch.equal(train.labels, labels[:n])
    for loader, x, y in [
        (val, images[n : n + 10_000], labels[n : n + 10_000]),
        (test, flat["test_images"].flatten(1), flat["test_labels"].long()),
    ]:
        assert torch.equal(loader.images, x)
        seen, seen_labels = epoch(loader)
        assert torch.equal(seen, x.float())
        assert torch.equal(seen_labels, y)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_mnist_batches(shift, drop_last):
    """Every training image once in an epoch, in random order, in grey values 0..255."""
    train, val, _ = mnist(batch_size=300, shift=shift, drop_last=drop_last)
    labels, train.labels = train.labels, torch.arange(40_000)
    batches = list(train)
    sizes = [300] * 133 + [100] * (not drop_last)
    assert [len(images) for images, _ in batches] == sizes
    assert len(train) == len(sizes)
    for images, rows in batches:
        assert (images.shape, images.dtype) == ((len(rows), 784), torch.float32)
    pixels, rows = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(rows.unique()) == len(rows)
    assert not torch.equal(rows[:300], torch.arange(300))
    assert (pixels.min(), pixels.max()) == (0, 255)
    if not shift:
        assert torch.equal(pixels, train.images[rows].float())
    train.labels = labels
    assert next(iter(train))[1].dtype == torch.int64
    assert sum(len(labels) for _, labels in val) == 10_000


def test_shifts_are_those_of_torchvisions_transforms():
    """The template's own pipeline: its results for each shift, and how often it draws them."""
    pad, crop = transforms.Pad(2, padding_mode="edge"), transforms.CenterCrop(28)
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)  # no symmetry, no plain edge
    pictures = [functional.to_pil_image(image) for image in images]
    shift_of = {}
    for i, picture in enumerate(pictures):
        for right in range(-2, 3):
            for down in range(-2, 3):
                moved = functional.affine(pad(picture), 0, [right, down], 1, [0])
                shift_of[i, np.asarray(crop(moved)).tobytes()] = down, right
    assert len(shift_of) == 20 * 25

    def counts(keys):
        """Return how often each shift occurs, `[5, 5]`, down and right."""
        table = collections.Counter(shift_of[key] for key in keys)
        return np.array([[table[down, right] for right in range(-2, 3)] for down in range(-2, 3)])

    n = 10_000
    repeated = images.flatten(1).repeat(n // 20, 1)
    loader = mnist_module.ShiftedLoader(repeated, torch.arange(n), 128, shuffle=True)
    seen, rows = epoch(loader)
    assert torch.equal(rows.sort().values, torch.arange(n))
    shown = zip(rows.tolist(), seen.byte().numpy(), strict=True)
    ours = counts((row % 20, x.tobytes()) for row, x in shown)
    shares = np.array([1, 10, 10, 10, 1]) / 32
    assert scipy.stats.chisquare(ours.ravel(), n * np.outer(shares, shares).ravel()).pvalue > 1e-3

    pipeline = transforms.Compose([pad, transforms.RandomAffine(0, translate=(0.05, 0.05)), crop])
    theirs = counts((0, np.asarray(pipeline(pictures[0])).tobytes()) for _ in range(3000))
    for axis in (0, 1):
        pair = [table.sum(axis=axis) for table in (ours, theirs)]
        assert scipy.stats.chi2_contingency(pair).pvalue > 1e-3


@pytest.mark.parametrize("options", [{}, {"shift": False}, {"binarization": "static"},
                                     {"binarization": "dynamic"}], ids=str)  # fmt: skip
def test_epochs_are_drawn_from_pytorchs_generator(options):
    """Each is another; the same state before it gives the same."""
    loader = (bmnist if "binarization" in options else mnist)(**options)[0]

    def first_batch():
        batch = next(iter(loader))
        return batch[0] if isinstance(batch, tuple) else batch

    torch.manual_seed(3)
    first, second = first_batch(), first_batch()
    torch.manual_seed(3)
    assert torch.equal(first, first_batch())
    assert not torch.equal(first, second)


def test_impossible_sizes():
    for n_train in (0, 50_001):
        assert str(n_train) in error_of(mnist, n_train=n_train)
    for make in (mnist, bmnist):
        assert "batch size 0 " in error_of(make, batch_size=0)
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


def test_static_images(static, arrays):
    grey, labels = (
        np.concatenate([arrays[f"train_{kind}"], arrays[f"test_{kind}"]]).reshape(70_000, -1)
        for kind in ("images", "labels")
    )
    splits = np.split(np.arange(70_000), [50_000, 60_000])
    for loader, rows in zip(static, splits, strict=True):
        assert (loader.images.shape, loader.images.dtype) == ((len(rows), 784), torch.uint8)
        assert_drawn_from(loader.images.numpy(), grey[rows])
        assert loader.labels.tolist() == labels[rows, 0].tolist()
    packed = np.packbits(torch.cat([loader.images for loader in static]).numpy())
    assert hashlib.sha256(packed).hexdigest() == bmnist_module.STATIC_SHA256


def test_static_pixels_are_independent(static, arrays):
    """Neighbouring draws, which share a 64-bit word, must not be correlated."""
    grey = arrays["test_images"].reshape(-1, 784) / 255
    noise = static[2].images.numpy() - grey
    variance = (grey * (1 - grey))[:, ::2] * (grey * (1 - grey))[:, 1::2]
    assert abs((noise[:, ::2] * noise[:, 1::2]).sum()) < 5 * np.sqrt(variance.sum())


def test_static_batches(static):
    train, val, test = static
    batches = list(train)
    assert len(batches) == len(train) == 391
    assert len(batches[-1]) == 80
    assert (batches[0].shape, batches[0].dtype) == ((128, 1, 28, 28), torch.float32)
    assert torch.equal(torch.cat(batches).sum(0).flatten(), train.images.sum(0).float())
    assert not torch.equal(batches[0].flatten(1), train.images[:128].float())
    for loader in (val, test):
        assert torch.equal(epoch(loader).flatten(1), loader.images.float())


def test_dynamic(static, arrays):
    train, val, test = bmnist(binarization="dynamic")
    grey = torch.from_numpy(arrays["train_images"][:50_000]).flatten(1)
    assert torch.equal(train.images, grey)
    rows = slice(0, 10_000)
    first, second = train.batch(rows), train.batch(rows)
    assert (first.shape, first.dtype) == ((10_000, 1, 28, 28), torch.float32)
    assert not torch.equal(first, second)
    for binary in (first, second):
        assert_drawn_from(binary.numpy(), grey[rows].numpy())
    for loader, fixed in [(val, static[1]), (test, static[2])]:
        assert torch.equal(epoch(loader), epoch(fixed))


def test_other_binarizations_and_other_bits(monkeypatch):
    message = error_of(bmnist, binarization="grey")
    assert all(word in message for word in ("'grey'", "static", "dynamic", "larochelle"))
    monkeypatch.setattr(bmnist_module, "STATIC_SEED", 2009)
    assert np.__version__ in error_of(bmnist)


# ------------------------ Larochelle's files ------------------------
@pytest.fixture
def amat(tmp_path, monkeypatch):
    """Write small files of Larochelle's form where they are looked for: their folder, images."""
    sizes = {"train": 7, "valid": 3, "test": 2}
    names = {f"binarized_mnist_{split}.amat": n for split, n in sizes.items()}
    assert names.keys() == bmnist_module.LAROCHELLE.keys()
    monkeypatch.setattr(bmnist_module, "LAROCHELLE", names)
    monkeypatch.setattr(bmnist_module, "FILE", tmp_path / "mnist.npz")
    images = [np.random.default_rng(n).integers(0, 2, (n, 784)) for n in names.values()]
    for name, image in zip(names, images, strict=True):
        np.savetxt(tmp_path / name, image, fmt="%d")
    return tmp_path, images


def test_larochelle(amat, monkeypatch):
    _, images = amat
    monkeypatch.setattr(bmnist_module, "load", None)  # mnist.npz is not needed
    loaders = bmnist(batch_size=2, binarization="larochelle")
    assert [len(loader) for loader in loaders] == [4, 2, 1]
    for loader, image in zip(loaders, images, strict=True):
        assert loader.labels is None
        assert loader.images.dtype == torch.uint8
        assert np.array_equal(loader.images.numpy(), image)
    assert np.array_equal(epoch(loaders[1]).flatten(1).numpy(), images[1])


EDITS = [
    (lambda lines: [], ": 0 lines, not 3"),
    (lambda lines: lines * 2, ": 6 lines, not 3"),
    (lambda lines: [lines[0], lines[1][:-2]], ", line 2: 783 values, not 784"),
    (lambda lines: [lines[0], lines[1] + " 1"], ", line 2: 785 values, not 784"),
    (lambda lines: [lines[0], "2" + lines[1][1:]], ", line 2: '2' is not 0 or 1"),
    (lambda lines: [lines[0], lines[1][:-1] + "01"], ", line 2: '01' is not 0 or 1"),
]


@pytest.mark.parametrize(("edit", "what"), EDITS)
def test_bad_larochelle_file(amat, edit, what):
    path = amat[0] / "binarized_mnist_valid.amat"
    path.write_text("\n".join(edit(path.read_text().splitlines())))
    assert error_of(bmnist, binarization="larochelle").startswith(f"{path}{what}")
    path.unlink()
    assert "No such file" in error_of(bmnist, binarization="larochelle")
