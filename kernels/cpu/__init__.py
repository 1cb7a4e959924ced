"""What makes a CPU fast, and nothing else: no result depends on it beyond rounding.

attention.py    over blocks of queries
rounding.py     sizes that are rounded up so that oneDNN meets them again
process.py      the allocator, and oneDNN's caches
"""
