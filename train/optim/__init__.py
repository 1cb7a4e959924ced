"""The update rules, and the buffers that they work on."""
