"""The recipes that `mmseq demo` runs: links to `data_mixes/`, `train/` and `tokenizers/`.

A wheel carries them as files.
"""
