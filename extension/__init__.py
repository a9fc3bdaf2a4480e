"""The lessons that build on the scripts."""
