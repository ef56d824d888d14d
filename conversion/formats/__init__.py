"""The formats of checkpoints: how each is recognised, its tables of names, its configuration, and its files.

- recognition: which format a source has, by its content
- hub_formats: the published Hub layouts, which are also this package's; published_settings, published_files: these written
- raw_formats, raw_towers, raw_files: files of the published training code
- llava_formats, llava_parts: chat checkpoints of the LLaVA code base; image_token: the token they lack
- native_settings, native_tables, native_files: transformers' own InternVL; llama_decoder: InternLM2 as a LLaMA
- rules, key_tables: tables of names, read both ways; edits: changes that are asked for
"""
