"""The run. The walk: run.py, assemble.py, loop.py, batches.py, step.py, loss.py, evaluate.py.

run.py       the table of contents of a run
config/      what a run is asked to do, and the command line that asks
inputs/      what it takes in: rows, base model, the adapter that it goes on from
plan/        what it will take before it starts; where every `auto` is decided
assemble.py  all that a run works with
loop.py batches.py step.py loss.py evaluate.py   training
state.py     what a run works with, and what a resume continues from
precision.py what is computed in
optim/       the update rules and their buffers
saving/      checkpoints, best/, final/, resume, the proof that it is exact
log/         metrics.jsonl, TensorBoard, the console
report/      report.md and its plots, the model card, runs compared
publish/     what leaves this machine when asked: to the Hub, to other trackers
finish.py    before the first step and after the last
generate.py generation/ merge.py    using the result
evaluation/  how good it is: likelihood, completions, programs that pass; what a merge changed
survey.py show_data.py  a look before anything large is read; the rows
process/ text.py        command line manners, signals, ranks, memory; how numbers are written
"""
