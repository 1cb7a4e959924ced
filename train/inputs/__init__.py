"""What a run takes in: its rows, its base model, and the adapter that it goes on from."""
