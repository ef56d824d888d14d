"""What a written folder is made of.

- result: the kinds of models
- shards: the weights, written as they are read
- code, processor, generation, card, licence: code, processor, generation settings, README.md and the licence
- tokenizer: the tokenizer, without remote code; sentencepiece_model: one made of a tokenizer.model
- records: what makes the way back lossless
- target: the folder itself, complete or not there; publish: the folder on the Hub
"""
