"""What a result is made of.

- forms: the forms in which a model can be written; published_layout, published_files, native_files: what two of them need
- shards: the weights, written as they are read
- repository: configuration, code, processor, generation settings; model_card: its README.md
- tokenizer_files: the tokenizer, without remote code; sentencepiece_model: one made of a tokenizer.model
- records: what makes the way back lossless
- publish: the result on the Hub
"""
