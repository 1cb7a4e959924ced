"""The demo's data: rows and tokenizer made from the Python standard library, and their builder."""
