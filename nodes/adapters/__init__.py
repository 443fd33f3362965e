"""All that touches ComfyUI's own modules: core types in, core types out."""
