"""Benches: each measures the running product from outside, prints one table and writes one JSON."""
