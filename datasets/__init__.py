"""MNIST in grey values (`datasets.mnist`) and in binary ones (`datasets.bmnist`)."""
