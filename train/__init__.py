"""The run. The walk: run.py, assemble.py, loop.py, batches.py, step.py, loss.py, evaluate.py.

run.py command.py world.py signals.py   the table of contents; the command line's manners
config/      what a run is asked to do, and the command line that asks
plan/        what it will take before it starts; where every `auto` is decided
dataset.py base_model.py assemble.py    rows, model, and all that a run works with
loop.py batches.py step.py loss.py evaluate.py   training
state.py precision.py memory.py         what a resume continues from; what is computed in
optim/       the update rules and their buffers
saving/      checkpoints, best/, final/, resume, the proof that it is exact
log/         metrics.jsonl, TensorBoard, the console
report/      report.md and its plots
finish.py    before the first step and after the last
artifact.py generate.py merge.py        using the result
survey.py show_data.py       a look before anything large is read; the rows
"""
