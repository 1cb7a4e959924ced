"""report.md and its plots: what became of a run (`python -m train.report RUN…`)."""
