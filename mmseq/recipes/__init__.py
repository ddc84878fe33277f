"""The recipes that `mmseq demo` runs: links to `data_mixes/`, `train/` and `tokenizers/`, which a wheel carries as files."""
