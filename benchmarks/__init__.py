"""Benchmarks: each times both sides in one run and appends records that say where and how."""

import os
import sys

if "--dry-run" in sys.argv:  # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
