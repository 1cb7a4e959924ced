"""The trials leave this process as it was."""
