"""How good a model is on rows that it was not trained on.

holes.py        held-out holes that the model fills exactly (`eval.holes`)
"""
