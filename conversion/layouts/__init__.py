"""What a source is: tables of names, and the configuration that follows.

- recognition: which layout a source has, by its content
- hub_layouts: the published Hub layouts, which are also this package's
- raw_layouts, raw_towers: files of the published training code
- llava_layouts: chat checkpoints of the LLaVA code base; image_token: the token they lack
- native_layout, native_tables: transformers' own InternVL; llama_decoder: InternLM2 as a LLaMA
"""
