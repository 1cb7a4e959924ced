"""`lathe evaluate`: how good a model is on rows that it was not trained on.

__main__.py     the command: what it is asked
command.py      what it does: rows in, a table or JSON out
likelihood.py   loss and accuracy of each row's targets; standard errors
code.py         what a completion is worth as code: it parses, it is the reference
problems.py     rows with tests: HumanEval's and MBPP's columns; pass@k
programs.py     a program in a limited child process
confined.py     that child's own part
during.py       an evaluation of a run, while it lasts
receipt.py      a merged model beside the adapted one
rated.py        completions of held-out rows at an evaluation of a run (`eval.metrics`)
holes.py        held-out holes that the model fills exactly (`eval.holes`)
"""
