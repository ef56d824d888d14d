"""A page in Gradio, in an environment of its own: Gradio asks for an older Pillow than is safe to read images with."""
