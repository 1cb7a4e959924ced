"""Arithmetic on tensors: what the models and the loss compute, and nothing about what it is for.

Activations are flat: a micro-batch is M token rows, without a batch dimension, and `Segments` says
where its documents begin. The same rows give the same numbers whether documents are padded, lie
end to end, or come one at a time; only speed and memory differ.

    segments.py    where documents begin, positions, and the keys that dropout draws from
    operands.py    what a linear layer, adapted or not, hands to `linears`
    dropout.py     masks as a pure function of (seed, step, example, position, module, column)
    quantised.py   weights in four and eight bits, and how they become tensors again
    streamed.py    weights in host memory, brought layer by layer
    linears.py attention.py loss.py reference.py      every operation in plain PyTorch: the truth
    varlen.py      flash attention over documents end to end, where a GPU has it
    cpu/           what makes a CPU fast
    triton/        the same operations as Triton kernels, for CUDA
    dispatch.py    which backend a model gets, decided once when it is built

A model is given an `Operations` by `dispatch.operations` and calls its arithmetic through it.
"""
