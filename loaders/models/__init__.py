"""Loads files as ComfyUI's models, and reloads them."""
