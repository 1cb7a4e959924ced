"""Benchmarks: each times both sides in one run and appends records that say where and how."""
