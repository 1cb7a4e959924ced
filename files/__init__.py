"""The ground floor: everything that touches the disk and the Hugging Face Hub, and the error class.

* `errors`: `UserError`, the one error that a user sees, and the nearest-name hint.
* `atomic`: files that are either whole or not there, file hashes, and the lock on a run's folder.
* `strict_json`: JSON that others wrote, read without Python's leniency.
* `tensors`: safetensors files in and out.
* `hub`: a folder or a Hub repository in, local files and the commit they come from out.

Nothing here knows of models, adapters, rows or training, so every other folder may use it.
"""
