"""The process that a run is: its command line's manners, signals, ranks and memory."""
