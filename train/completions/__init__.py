"""What a model says, measured: texts that it completes while it is trained."""
