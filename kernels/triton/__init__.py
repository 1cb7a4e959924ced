"""The operations as Triton kernels, for CUDA; nothing outside this folder imports triton.

linears.py      adapted layers; their large products are cuBLAS's
adapters.py     the small products, whose dropout is drawn inside
norms.py elementwise.py loss.py
updates.py      AdamW and Adafactor
jit.py          how they are compiled
launch.py       launch parameters, and what was measured; needs no triton
"""
