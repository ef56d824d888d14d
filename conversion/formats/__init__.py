"""The formats of checkpoints: how each is recognised, read and, where `--to` names it, written.

- recognition: all formats; format: what one is; content: a model between reading and writing
- own_format: this package's; published_format, published_settings, published_files: the published Hub layouts;
  hub_settings: configurations of both
- native_format, native_settings, native_tables, native_files: transformers' own InternVL
- raw_formats, raw_towers, raw_files: files of the published training code
- llava_formats, llava_parts: chat checkpoints of the LLaVA code base; image_token: the token they lack
- rules, key_tables: tables of names, read both ways; edits, llama_decoder: changes that are asked for
"""
