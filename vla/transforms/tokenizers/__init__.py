"""Action tokenizers: conversion of normalised action chunks to token ids and back."""

from vla.transforms.tokenizers import bins, components, digits, fast, splines  # noqa: F401  (they register themselves)
