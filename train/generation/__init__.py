"""Text from a model: `lathe generate`, and what `lathe evaluate` completes.

command.py   the command: one prompt, a comparison, rows, a chat
sampling.py  which token comes next
decode.py    the loop that writes, for one prompt or several together
loaded.py    a model with its tokenizer and prompt format: of a run, an adapter, a folder
stream.py    text as its tokens come
rows.py      completions of a file's rows; what is kept when it is stopped
chat.py      a conversation and what the cache holds of it
"""
