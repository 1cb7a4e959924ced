"""`lathe merge`, `python -m train.merge`: an adapter folded into its base model."""
