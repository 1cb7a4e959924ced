"""Triton's kernels for tests: compiled where there is a GPU, else interpreted.

Triton decides when it is imported, so this module comes before whatever else may import it.
`TRITON` says whether triton is installed at all.
"""

import importlib.util
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = importlib.util.find_spec("triton") is not None

if TRITON and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# cuBLAS reads it at its first product; `train.deterministic`, which some tests ask for, needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
