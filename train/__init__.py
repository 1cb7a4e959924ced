"""The run. Read run.py, the table of contents; then loop.py and step.py.

run.py arguments.py command.py      the command line
settings.py config.py presets/      what a run is asked to do
plan.py ledger.py claims.py preview.py   what it will take, before it starts
prepare.py world.py signals.py      data, model, device, processes, requests to stop
loop.py step.py loss.py evaluate.py early_stopping.py samples.py   training
flat.py optimizers.py adafactor.py schedule.py precision.py   the update
session.py checkpoint.py resume.py folder.py finish.py   state, files, and the end of a run
metrics.py console.py report.py plots.py   what is said of it
generate.py merge.py                using the result
"""
