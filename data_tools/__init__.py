"""From text to tokens that a trainer can read: corpora, tokenizers, shards, and the resumable reader.

Run `python -m data_tools --help` for the commands; import `data_tools.reader` for training.
The path of a corpus through this package:

    corpus.py, documents.py   text files (jsonl, gz, zst, txt, parquet) become a stream of documents
    tokenizer.py, backends.py a tokenizer.json, and the fastest encoder that agrees with it
    tokenize.py               the job: hash pass, global exact dedup, tokenization, shards, manifest
    manifest.py, shards.py    what lies on disk; verify.py proves that it is still what was written
    store.py, order.py        memory-mapped samples and the global sample order
    reader.py                 the torch dataset, split over data-parallel ranks, resumable by one integer

This module imports nothing, so that `--help` answers at once.
"""
