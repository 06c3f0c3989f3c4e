"""Measurements: bytes counted without a GPU, timings on whatever device is there, and what is drawn from them."""
