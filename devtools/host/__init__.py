"""The environment that everything runs in: ComfyUI itself, its server, a browser, the package of
the registry."""
