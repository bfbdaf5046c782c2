"""What a file's weights need to become one of ComfyUI's models: names, formats, checks."""
