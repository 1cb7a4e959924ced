"""What is wrong with rows before they are trained on: `lathe lint`, `python -m data.lint`."""
