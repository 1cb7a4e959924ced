"""What leaves this machine, and only when asked: a result to the Hub, metrics to other trackers."""
